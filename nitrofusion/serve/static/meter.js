// Latency from input to pixels over the last minute.

const MINUTE = 60_000;
const $ = (id) => document.getElementById(id);
const milliseconds = (x) => (x < 9.95 ? `${x.toFixed(1)} ms` : x < 9950 ? `${Math.round(x)} ms` : `${(x / 1000).toFixed(1)} s`);

export class Meter {
  #samples = [];  // [time, latency]
  #painted = 0;

  constructor() {
    setInterval(() => this.#paint(), 1000);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
  }

  add(latency) {
    this.#samples.push([performance.now(), latency]);
    if (performance.now() - this.#painted > 100) this.#paint();
  }

  server(queue, dropped) {
    $("queue").textContent = queue;
    $("dropped").textContent = dropped;
  }

  // p of the last minute by nearest rank; null without any.
  percentile(p) {
    const sorted = this.#samples.map((sample) => sample[1]).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.max(0, Math.ceil(p * sorted.length) - 1)] : null;
  }

  #paint() {
    const now = (this.#painted = performance.now());
    while (this.#samples.length && now - this.#samples[0][0] > MINUTE) this.#samples.shift();
    for (const [id, p] of [["p50", 0.5], ["p99", 0.99]]) {
      const value = this.percentile(p);
      $(id).textContent = value === null ? "–" : milliseconds(value);
    }
    const canvas = $("trace"), g = canvas.getContext("2d"), { width, height } = canvas;
    const top = Math.max(20, ...this.#samples.map((sample) => sample[1]));
    const style = getComputedStyle(document.documentElement);
    g.clearRect(0, 0, width, height);
    g.fillStyle = style.getPropertyValue("--line");
    g.fillRect(0, height - 2, width, 2);
    g.fillStyle = style.getPropertyValue("--accent");
    for (const [time, latency] of this.#samples) {
      const x = width - 3 - ((now - time) / MINUTE) * (width - 3);
      const h = Math.max(3, (latency / top) * height);
      g.fillRect(x, height - h, 3, h);
    }
  }
}
