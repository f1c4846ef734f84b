// The image to start from: dropped, pasted, chosen, or the webcam's. It leaves the page at the model's size, as PNG.

const $ = (id) => document.getElementById(id);

const end = (media) => media.getTracks().forEach((track) => track.stop());

export class Source extends EventTarget {
  #canvas = document.createElement("canvas");
  #video = null;
  #awaited = null;  // the video whose next frame is waited for
  #wish = null;  // the newest start; while its user is asked for permission, whatever comes later ends it
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
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      throw new Error("this image cannot be read (PNG, JPEG or WebP)");
    }
    this.stop();  // its next frame would take the file's place
    const fits = bitmap.width === this.#canvas.width && bitmap.height === this.#canvas.height;
    this.#crop(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
    const small = fits && file.type === "image/png" && file.size < 4 * 2 ** 20;
    await this.#set(small ? new Uint8Array(await file.arrayBuffer()) : await this.#encode());
  }

  // What an entry of the history was drawn from.
  async restore(bytes) {
    if (bytes === null) return this.clear();
    const bitmap = await createImageBitmap(new Blob([bytes]));
    this.#crop(bitmap, bitmap.width, bitmap.height);
    await this.#set(bytes);
  }

  clear() {
    this.stop();
    this.bytes = null;
    this.#show();
  }

  async start() {
    if (!navigator.mediaDevices) throw new Error("the browser gives no webcam to this address");
    const wish = (this.#wish = {});
    const media = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 640 }, audio: false });
    const video = document.createElement("video");
    video.srcObject = media;
    video.muted = video.playsInline = true;
    if (this.#wish === wish) await video.play();
    if (this.#wish !== wish) return end(media);
    this.#video = video;
    $("camera").ariaPressed = "true";
    await this.next();
  }

  stop() {
    this.#wish = null;
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
    await this.#set(await this.#encode("image/jpeg"));
  }

  // The middle of `image`, at the model's size.
  #crop(image, width, height) {
    const { width: w, height: h } = this.#canvas, g = this.#canvas.getContext("2d");
    const scale = Math.max(w / width, h / height), dw = width * scale, dh = height * scale;
    g.imageSmoothingQuality = "high";
    g.drawImage(image, (w - dw) / 2, (h - dh) / 2, dw, dh);
  }

  async #encode(type = "image/png") {
    const blob = await new Promise((done) => this.#canvas.toBlob(done, type, 0.92));
    return new Uint8Array(await blob.arrayBuffer());
  }

  async #set(bytes) {
    this.bytes = bytes;
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  #show() {
    const has = this.bytes !== null;
    $("thumb").hidden = $("remove").hidden = !has;
    document.querySelector(".strength").hidden = !has;
    if (has) $("thumb").getContext("2d").drawImage(this.#canvas, 0, 0, 96, 96);
  }
}
