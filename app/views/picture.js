// The picture itself with each pixel's mean over its three bytes laid over it.
const stage = element.querySelector(".stage");
const sheet = element.querySelector(".sheet");
const [pixels, heat, hatching] = ["pixels", "heat", "hatching"].map((name) => sheet.querySelector(`.${name}`));
const [marker, chosen] = ["marker", "chosen"].map((name) => sheet.querySelector(`.${name}`));
const slider = element.querySelector("input");
const largest = () => Math.max(512, Math.min(900, 0.55 * innerHeight)); // CSS pixels
const FINEST = 2048; // pixels of the canvas that holds the hatching
let zoom = 1;

const blank = (canvas, width, height) => {
  Object.assign(canvas, { width, height });
  return new ImageData(width, height);
};

function show() {
  const { file } = book;
  zoom = 1;
  const picture = blank(pixels, file.width, file.height);
  for (let pixel = 0, from = 0; pixel < picture.data.length; pixel += 4, from += 3) {
    picture.data[pixel] = file.values[from];
    picture.data[pixel + 1] = file.values[from + 1];
    picture.data[pixel + 2] = file.values[from + 2];
    picture.data[pixel + 3] = 255;
  }
  pixels.getContext("2d").putImageData(picture, 0, 0);
  hatch();
  resize();
  paint();
  mark();
}

function resize() {
  const { width, height } = book.file;
  const limit = largest();
  // Small pictures grow by a whole factor so that pixels stay square.
  const whole = Math.max(width, height) > limit ? Math.min(1, limit / height) : Math.floor(limit / Math.max(width, height));
  sheet.style.width = `min(${width * whole * zoom}px, ${100 * zoom}%)`;
}

function paint() {
  const { file, shade } = book;
  const colours = blank(heat, file.width, file.height);
  const packed = new Uint32Array(colours.data.buffer);
  const { plane } = shade;
  for (let pixel = 0, from = 0; pixel < packed.length; pixel++, from += 3) {
    packed[pixel] = shade.packed[shade.level((plane[from] + plane[from + 1] + plane[from + 2]) / 3)];
  }
  heat.getContext("2d").putImageData(colours, 0, 0);
}

/** Black and white lines over the pixels with little context, on a finer grid than theirs where there is room. */
function hatch() {
  const { file } = book;
  const fine = Math.max(1, Math.min(8, Math.floor(FINEST / Math.max(file.width, file.height))));
  const lines = blank(hatching, file.width * fine, file.height * fine);
  const packed = new Uint32Array(lines.data.buffer);
  for (let pixel = 0; pixel < file.width * file.height; pixel++) {
    if (!file.isHatched(3 * pixel)) continue;
    const [left, top] = [(pixel % file.width) * fine, Math.floor(pixel / file.width) * fine];
    for (let y = top; y < top + fine; y++) {
      for (let x = left; x < left + fine; x++) {
        const step = (x + y) % 8;
        if (step < 1) packed[y * lines.width + x] = 0xb0ffffff;
        else if (step < 2) packed[y * lines.width + x] = 0xb0000000;
      }
    }
  }
  hatching.getContext("2d").putImageData(lines, 0, 0);
}

function at(event) {
  const { width, height } = book.file;
  const box = heat.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * height);
  return x >= 0 && y >= 0 && x < width && y < height ? 3 * (y * width + x) : -1;
}

const [column, row] = [(offset) => Math.floor(offset / 3) % book.file.width, (offset) => Math.floor(offset / 3 / book.file.width)];

function put(box, left, top, right, bottom) {
  const { width, height } = book.file;
  box.hidden = false;
  Object.assign(box.style, {
    left: `${(left / width) * 100}%`, top: `${(top / height) * 100}%`,
    width: `${((right - left) / width) * 100}%`, height: `${((bottom - top) / height) * 100}%`,
  });
}

function mark() {
  const { cursor, selection, file } = book;
  marker.hidden = cursor < 0;
  if (cursor >= 0) put(marker, column(cursor), row(cursor), column(cursor) + 1, row(cursor) + 1);
  chosen.hidden = !selection;
  if (!selection) return;
  const [first, last] = [selection[0][0], selection.at(-1)[1] - 1];
  // A range that runs over the edge of a row takes whole rows; a rectangle has one range for each of its rows.
  const isRectangle = selection.length > 1 || row(first) === row(last);
  put(chosen, isRectangle ? column(first) : 0, row(first), isRectangle ? column(last) + 1 : file.width, row(last) + 1);
}

/** All rows of the rectangle between two pixels. */
function drag(from, to) {
  const { width } = book.file;
  const [left, right] = [column(from), column(to)].sort((a, b) => a - b);
  const [top, bottom] = [row(from), row(to)].sort((a, b) => a - b);
  book.select(Array.from({ length: bottom - top + 1 }, (_, i) => [3 * ((top + i) * width + left), 3 * ((top + i) * width + right + 1)]));
}

function enlarge(factor) {
  zoom = Math.max(1, Math.min(16, zoom * factor));
  resize();
  if (book.cursor >= 0) marker.scrollIntoView({ block: "nearest", inline: "nearest" });
}

slider.addEventListener("input", () => (heat.style.opacity = slider.value));
heat.style.opacity = slider.value;
element.querySelector(".in").addEventListener("click", () => enlarge(2));
element.querySelector(".out").addEventListener("click", () => enlarge(0.5));
stage.addEventListener("keydown", ({ key }) => (key === "+" || key === "=" ? enlarge(2) : key === "-" && enlarge(0.5)));
pointer(heat, at, drag);
arrowKeys(stage, () => ({ ArrowLeft: -3, ArrowRight: 3, ArrowUp: -3 * book.file.width, ArrowDown: 3 * book.file.width }));
follow(element, ["image"], { show, paint, mark });
