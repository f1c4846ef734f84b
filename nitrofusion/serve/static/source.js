// The image to start from: dropped, pasted, chosen, or the webcam's. It leaves the page at the model's size, as PNG.

const $ = (id) => document.getElementById(id);

const end = (media) => media.getTracks().forEach((track) => track.stop());

export class Source extends EventTarget {
  #canvas = document.createElement("canvas");
  #video = null;
  #awaited = null;  // the video whose next frame is waited for
  #turn = 0;  // counts what was begun or ended: whatever takes its time has to give way to what came later
  bytes = null;  // Uint8Array, or null without an image

  setup(info) {
    [this.#canvas.width, this.#canvas.height] = [info.width, info.height];
    $("thumb").style.imageRendering = info.width <= 128 ? "pixelated" : "auto";
  }

  get streaming() {
    return this.#video !== null;
  }

  // A picture file; one that already has the size is sent as it is, so that its digest stays the file's.
  async take(file) {
    let bitmap, turn = ++this.#turn;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      throw new Error("this image cannot be read (PNG, JPEG or WebP)");
    }
    if (turn !== this.#turn) return bitmap.close();
    this.stop();  // its next frame would take the file's place
    turn = this.#turn;
    const fits = bitmap.width === this.#canvas.width && bitmap.height === this.#canvas.height;
    this.#crop(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
    const small = fits && file.type === "image/png" && file.size < 4 * 2 ** 20;
    const bytes = small ? new Uint8Array(await file.arrayBuffer()) : await this.#encode();
    if (turn === this.#turn) this.#set(bytes);
  }

  // What an entry of the history was drawn from, which is no change of its own. False if something came in between.
  async restore(bytes) {
    this.stop();
    const turn = this.#turn;
    if (bytes !== null) {
      const bitmap = await createImageBitmap(new Blob([bytes]));
      if (turn === this.#turn) this.#crop(bitmap, bitmap.width, bitmap.height);
      bitmap.close();
    }
    if (turn !== this.#turn) return false;
    this.bytes = bytes;
    this.#show();
    return true;
  }

  clear() {
    this.stop();
    this.bytes = null;
    this.#show();
  }

  async start() {
    if (!navigator.mediaDevices) throw new Error("the browser gives no webcam to this address");
    const turn = ++this.#turn;
    const media = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 640 }, audio: false });
    const video = document.createElement("video");
    video.srcObject = media;
    video.muted = video.playsInline = true;
    try {
      if (turn === this.#turn) await video.play();
    } catch (error) {
      end(media);
      throw error;
    }
    if (turn !== this.#turn) return end(media);
    this.#video = video;
    for (const track of media.getTracks()) track.onended = () => this.#video === video && this.#lost();  // unplugged
    $("camera").ariaPressed = "true";
    await this.next();
  }

  stop() {
    this.#turn += 1;
    if (!this.#video) return;
    end(this.#video.srcObject);
    this.#video = null;
    $("camera").ariaPressed = "false";
  }

  // The webcam's next image, mirrored as in a mirror: never one twice, and none while nobody sees the page.
  async next() {
    const video = this.#video;
    if (!video || this.#awaited === video) return;
    this.#awaited = video;
    await new Promise((done) => (video.requestVideoFrameCallback ? video.requestVideoFrameCallback(done) : requestAnimationFrame(done)));
    if (this.#awaited === video) this.#awaited = null;
    if (this.#video !== video) return;
    const g = this.#canvas.getContext("2d");
    g.save();
    g.translate(this.#canvas.width, 0);
    g.scale(-1, 1);
    this.#crop(video, video.videoWidth, video.videoHeight);
    g.restore();
    const bytes = await this.#encode("image/jpeg");
    if (this.#video === video) this.#set(bytes);
  }

  // The middle of `image`, at the model's size.
  #crop(image, width, height) {
    const { width: w, height: h } = this.#canvas, g = this.#canvas.getContext("2d");
    const scale = Math.max(w / width, h / height), dw = width * scale, dh = height * scale;
    g.imageSmoothingQuality = "high";
    g.clearRect(0, 0, w, h);  // what is transparent would show the image before
    g.drawImage(image, (w - dw) / 2, (h - dh) / 2, dw, dh);
  }

  async #encode(type = "image/png") {
    const blob = await new Promise((done) => this.#canvas.toBlob(done, type, 0.92));
    return new Uint8Array(await blob.arrayBuffer());
  }

  #lost() {
    this.stop();
    this.dispatchEvent(new Event("lost"));
  }

  #set(bytes) {
    this.bytes = bytes;
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  #show() {
    const has = this.bytes !== null;
    $("thumb").hidden = $("remove").hidden = !has;
    document.querySelector(".strength").hidden = !has;
    if (!has) return;
    const g = $("thumb").getContext("2d");
    g.clearRect(0, 0, 96, 96);
    g.drawImage(this.#canvas, 0, 0, 96, 96);
  }
}
