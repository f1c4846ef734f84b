// The strip of pictures settled on, newest first.

const $ = (id) => document.getElementById(id);
const MOST = 80;

export class History extends EventTarget {
  #entries = [];  // {key, settings, button}
  #current = null;

  // Adds what is shown, or its next stage of refinement.
  put(key, settings, thumbnail) {
    let entry = this.#entries.find((one) => one.key === key);
    if (!entry) {
      entry = { key, button: document.createElement("button") };
      entry.button.type = "button";
      entry.button.addEventListener("click", () => this.#select(entry, true));
      this.#entries.unshift(entry);
      const item = document.createElement("li");
      item.append(entry.button);
      $("strip").prepend(item);
      if (this.#entries.length > MOST) this.#entries.pop().button.parentElement.remove();
    }
    entry.settings = settings;
    const badge = document.createElement("small");
    badge.textContent = settings.shown;
    entry.button.replaceChildren(thumbnail, badge);
    const words = `${settings.prompt}, seed ${settings.seed}, ${settings.shown} ${settings.shown === 1 ? "step" : "steps"}`;
    entry.button.ariaLabel = entry.button.title = words;
    $("no-history").hidden = true;
    this.#select(entry, false);
  }

  // The neighbour of the current entry: 1 is older, -1 newer.
  step(by) {
    const at = this.#entries.indexOf(this.#current) + by;
    if (this.#entries[at]) this.#select(this.#entries[at], true);
  }

  #select(entry, chosen) {
    this.#current = entry;
    for (const one of this.#entries) one.button.ariaCurrent = String(one === entry);
    if (!chosen) return;
    entry.button.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.dispatchEvent(new CustomEvent("choose", { detail: entry.settings }));
  }
}
