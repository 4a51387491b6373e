// The picture itself with each pixel's mean bits laid over it.
const stage = element.querySelector(".stage");
const pixels = element.querySelector(".pixels");
const heat = element.querySelector(".heat");
const marker = element.querySelector(".marker");
const slider = element.querySelector("input");
const LARGEST = 512; // CSS pixels; small pictures grow by a whole factor so that pixels stay square
let file = null;
let cursor = -1;

function show(document) {
  file = document;
  cursor = -1;
  marker.hidden = true;
  const { width, height } = file;
  stage.style.width = `${width * Math.max(1, Math.floor(LARGEST / Math.max(width, height)))}px`;
  const picture = new ImageData(width, height);
  const colours = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const mean = (file.bits(3 * pixel) + file.bits(3 * pixel + 1) + file.bits(3 * pixel + 2)) / 3;
    picture.data.set(file.values.subarray(3 * pixel, 3 * pixel + 3), 4 * pixel);
    colours.data.set(bytes.rgb(bytes.level(mean)), 4 * pixel);
    picture.data[4 * pixel + 3] = colours.data[4 * pixel + 3] = 255;
  }
  for (const [canvas, image] of [[pixels, picture], [heat, colours]]) {
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}

function at(event) {
  const box = heat.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * file.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * file.height);
  return x >= 0 && y >= 0 && x < file.width && y < file.height ? 3 * (y * file.width + x) : -1;
}

function describe(offset) {
  const channels = [0, 1, 2].map((c) => file.bits(offset + c).toFixed(1)).join(" / ");
  const x = (offset / 3) % file.width;
  return `x ${x}, y ${Math.floor(offset / 3 / file.width)}\nRGB ${file.values.subarray(offset, offset + 3).join(", ")}\n${channels} bits`;
}

function mark(offset) {
  if (!file || offset >= file.count) return;
  cursor = offset;
  const pixel = Math.floor(offset / 3);
  marker.hidden = false;
  marker.style.left = `${((pixel % file.width) / file.width) * 100}%`;
  marker.style.top = `${(Math.floor(pixel / file.width) / file.height) * 100}%`;
  marker.style.width = `${100 / file.width}%`;
  marker.style.height = `${100 / file.height}%`;
}

slider.addEventListener("input", () => (heat.style.opacity = slider.value));
heat.style.opacity = slider.value;
bytes.pointer(heat, at, describe);
bytes.onCursor(mark);
bytes.arrowKeys(stage, () => ({ ArrowLeft: -3, ArrowRight: 3, ArrowUp: -3 * file.width, ArrowDown: 3 * file.width }), () => cursor, () => file.count);
bytes.follow(element, props, watch, ["image"], show);
