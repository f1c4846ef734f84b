// The connection: settings out, pictures in. It comes back by itself when the server does.

const meta = document.querySelector('meta[name="nitrofusion-token"]');
const WAITS = [200, 400, 800, 1500, 3000];  // ms between attempts
const FULL = 1013;  // the close code of a server that takes no more live users

// Where visitors have to bring the token it is in the address behind #, which browsers do not send.
function brought() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  history.replaceState(null, "", location.pathname);
  if (/^[\w-]+$/.test(token)) sessionStorage.setItem("token", token);  // no other is a WebSocket's protocol
}
brought();

// Its "close" says in `detail` why there is no connection: "token", "full", or "" where the server is away.
export class Live extends EventTarget {
  #socket = null;
  #attempt = 0;
  #why = "";
  #token = meta.content || sessionStorage.getItem("token") || "";

  constructor() {
    super();
    addEventListener("hashchange", () => {  // the address with the token, opened where the page is already
      brought();
      this.#token = meta.content || sessionStorage.getItem("token") || "";
    });
  }

  connect() {
    const address = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`;
    const socket = new WebSocket(address, ["nitrofusion.v1", `token.${this.#token}`]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code }) => {
      this.#socket = null;
      this.#closed(code === FULL ? "full" : this.#why === "full" ? "" : this.#why);
      setTimeout(() => this.#again(), WAITS[Math.min(this.#attempt++, WAITS.length - 1)]);
    };
    this.#socket = socket;
  }

  #closed(why) {
    this.#why = why;
    this.dispatchEvent(new CustomEvent("close", { detail: why }));
  }

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  // An object, and the bytes of an image if there is one.
  send(message, image = null) {
    if (!this.open) return false;
    const text = JSON.stringify(message);
    if (!image) {
      this.#socket.send(text);
      return true;
    }
    const json = new TextEncoder().encode(text);
    const bytes = new Uint8Array(4 + json.length + image.length);
    new DataView(bytes.buffer).setUint32(0, json.length);
    bytes.set(json, 4);
    bytes.set(image, 4 + json.length);
    this.#socket.send(bytes);
    return true;
  }

  // A server that was started again has another token, which its page holds. Where visitors bring it, an endpoint tells
  // whether ours is the one: a WebSocket that is refused looks like one that nobody answers.
  async #again() {
    try {
      if (!meta.content) {
        const { status } = await fetch("/v1/models", { headers: { authorization: `Bearer ${this.#token}` } });
        this.#closed(status === 401 ? "token" : this.#why === "token" ? "" : this.#why);
      } else {
        const text = await (await fetch("/", { cache: "no-store" })).text();
        const page = new DOMParser().parseFromString(text, "text/html");
        this.#token = page.querySelector('meta[name="nitrofusion-token"]')?.content || this.#token;
      }
    } catch {
      this.#closed("");
    }
    this.connect();
  }

  #receive(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      if (message.type === "hello") [this.#attempt, this.#why] = [0, ""];
      this.dispatchEvent(new CustomEvent(message.type, { detail: message }));
      return;
    }
    const size = new DataView(data).getUint32(0);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
    header.blob = new Blob([new Uint8Array(data, 4 + size)], { type: header.media_type });
    this.dispatchEvent(new CustomEvent(header.type, { detail: header }));
  }
}
