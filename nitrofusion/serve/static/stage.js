// The picture: the newest one, its stages of refinement, and the comparison of few steps with many.

const $ = (id) => document.getElementById(id);

export class Stage {
  #stages = new Map();  // steps -> ImageBitmap, of one input
  #seq = -1;
  #comparing = false;
  #width = 0;  // of a picture, in pixels

  constructor() {
    $("slider").addEventListener("input", () => $("frame").style.setProperty("--at", `${$("slider").value}%`));
    addEventListener("resize", () => this.#align());  // zoomed, or on another screen
  }

  setup(info) {
    $("frame").classList.toggle("pixels", info.width <= 128);
    $("strip").classList.toggle("pixels", info.width <= 128);
    this.steps = info.steps;
    this.#width = info.width;
    this.#align();
    $("pips").replaceChildren(...info.steps.map(() => document.createElement("li")));
    for (const canvas of [$("last"), $("first")]) [canvas.width, canvas.height] = [info.width, info.height];
    $("frame").classList.toggle("empty", !this.#stages.size);
    if (this.#stages.size) this.#draw();
  }

  #align() {
    $("stage").style.setProperty("--pixels", this.#width && this.#width <= 128 ? `${this.#width / devicePixelRatio}px` : "1px");
  }

  show(seq, steps, bitmap, label) {
    if (seq !== this.#seq) {
      for (const old of this.#stages.values()) old.close();
      this.#stages.clear();
      this.#seq = seq;
    }
    this.#stages.set(steps, bitmap);
    $("last").ariaLabel = label;
    this.#draw();
  }

  get comparing() {
    return this.#comparing;
  }

  compare(on) {
    this.#comparing = on;
    $("split").hidden = $("first").hidden = !on;
    $("compare").ariaPressed = String(on);
    if (this.#stages.size) this.#draw();
  }

  // A copy of what is shown, for the history.
  thumbnail(side) {
    const canvas = document.createElement("canvas"), shown = this.#shown()[1];
    const scale = Math.min(1, side / Math.max(shown.width, shown.height));
    [canvas.width, canvas.height] = [Math.round(shown.width * scale), Math.round(shown.height * scale)];
    canvas.getContext("2d").drawImage(shown, 0, 0, canvas.width, canvas.height);
    return canvas;
  }

  get shownSteps() {
    return this.#stages.size ? this.#shown()[0] : null;
  }

  #shown() {
    return [...this.#stages].reduce((a, b) => (b[0] > a[0] ? b : a));
  }

  #draw() {
    const [steps, last] = this.#shown();
    paint($("last"), last);
    $("frame").classList.remove("empty");
    $("compare").disabled = $("save").disabled = false;
    [...$("pips").children].forEach((pip, i) => pip.classList.toggle("done", this.steps[i] <= steps));
    if (!this.#comparing) return;
    const [fewest, first] = [...this.#stages].reduce((a, b) => (b[0] < a[0] ? b : a));
    paint($("first"), first);
    const words = (n) => `${n} ${n === 1 ? "step" : "steps"}`;
    const sides = $("split").querySelectorAll(".side");
    [sides[0].textContent, sides[1].textContent] = [words(fewest), words(steps)];
  }
}

function paint(canvas, bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}
