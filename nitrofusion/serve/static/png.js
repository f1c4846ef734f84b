// Settings in a PNG: the text chunk `nitrofusion` holds them as JSON. Nothing in them is run or trusted.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const ITXT = 0x69545874, IEND = 0x49454e44;  // types of chunks
const MAX_FILE = 64 * 1024 * 1024;
const MAX_TEXT = 64 * 1024;

// The settings of a file as an object, or null where it has none. Throws for settings that cannot be read.
export async function readSettings(file) {
  if (file.size > MAX_FILE) return null;
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) return null;
  const view = new DataView(bytes.buffer), latin = new TextDecoder("latin1");
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at), type = view.getUint32(at + 4);
    if (type === IEND || at + 12 + length > bytes.length) break;
    if (type === ITXT) {
      const text = international(bytes.subarray(at + 8, at + 8 + length), latin);
      if (text !== null) return parse(text);
    }
    at += 12 + length;
  }
  return null;
}

// keyword 0 flag method language 0 translated 0 text
function international(data, latin) {
  const end = data.indexOf(0);
  if (latin.decode(data.subarray(0, end)) !== "nitrofusion") return null;
  if (data[end + 1] !== 0) throw new Error("its settings are compressed");
  const language = data.indexOf(0, end + 3), translated = data.indexOf(0, language + 1);
  if (language < 0 || translated < 0) throw new Error("its settings are damaged");
  if (data.length - translated > 4 * MAX_TEXT) throw new Error("its settings are too long");
  return data.subarray(translated + 1);
}

function parse(data) {
  let value;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
  } catch {
    throw new Error("its settings are damaged");
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error("its settings are no object");
  return value;
}

// What of them the page can be set to, given what the server draws with: {settings, notes}.
export function understood(found, info) {
  const settings = {}, notes = [];
  for (const name of ["prompt", "negative_prompt"]) {
    if (typeof found[name] === "string") settings[name] = found[name].slice(0, 5000);
  }
  if (Number.isSafeInteger(found.seed) && found.seed >= 0) settings.seed = found.seed;
  else if ("seed" in found) notes.push(found.seed >= 2 ** 53 ? "its seed is too large for a web page" : "its seed is no whole number");
  if (info.steps.includes(found.num_inference_steps)) settings.steps = found.num_inference_steps;
  else if ("num_inference_steps" in found) notes.push(`this model draws in ${info.steps.join(", ")} steps`);
  if (typeof found.strength === "number" && found.strength >= 0.05 && found.strength <= 1) settings.strength = found.strength;
  else if ("strength" in found) notes.push("its strength is not from 0.05 to 1");
  if (found.model !== undefined && found.model !== info.model) notes.push(`it was drawn by another model than ${info.model}`);
  if (found.image !== undefined) notes.push("it was drawn from an image, which has to be dropped here as well");
  if (found.height !== undefined && (found.height !== info.height || found.width !== info.width)) {
    notes.push(`this page draws ${info.width}x${info.height}`);
  }
  return { settings, notes };
}
