// What is to be completed: a picture with a line to drag, a waveform with a handle, a text with a caret. The line, the slider
// and the byte offset are one number, which goes to the server when it is let go.
const { decode, make, scrollable, wave } = bytes;
const root = element.querySelector(".byte-prompt");
const message = root.querySelector(".message");
const source = root.querySelector(".source");
const stage = root.querySelector(".stage");
const range = root.querySelector("input[type=range]");
const number = root.querySelector("input[type=number]");
const SIDE = 420; // CSS pixels of a picture's longer side; less if small pixels stay whole
let shown = null; // the newest value with media
let cut = 0;
let parts = {};

const snap = (offset) => {
  const whole = Math.round(offset / shown.unit) * shown.unit;
  return Math.max(0, Math.min(shown.count - (shown.count % shown.unit), whole));
};

/** Moves the line everywhere; `tell` also says it to the server. */
function moveTo(offset, tell) {
  cut = snap(offset);
  range.value = cut;
  number.value = cut;
  MOVE[shown.kind]();
  if (tell) trigger("cut", { offset: cut });
}

function dragged(target, at) {
  target.addEventListener("pointerdown", (event) => {
    target.setPointerCapture(event.pointerId);
    moveTo(at(event), false);
    target.onpointermove = (move) => moveTo(at(move), false);
    target.onpointerup = target.onpointercancel = () => {
      target.onpointermove = target.onpointerup = target.onpointercancel = null;
      moveTo(cut, true);
    };
  });
}

const DRAW = {
  image({ width, height, rgba }) {
    const frame = make("div", "frame");
    const canvas = make("canvas", "pixels");
    canvas.width = width;
    canvas.height = height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The source, ${width} by ${height} pixels`);
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(decode(rgba)), width, height), 0, 0);
    const factor = SIDE / Math.max(width, height);
    const isSmall = factor >= 2;
    canvas.classList.toggle("small", isSmall);
    frame.style.width = `min(100%, ${width * (isSmall ? Math.floor(factor) : factor)}px)`;
    parts = { shade: make("div", "shade"), line: make("div", "line") };
    frame.append(canvas, parts.shade, parts.line);
    dragged(frame, (event) => {
      const box = canvas.getBoundingClientRect();
      const part = (event.clientY - box.top) / box.height;
      return (shown.upside_down ? 1 - part : part) * shown.whole;
    });
    return frame;
  },
  audio() {
    const frame = make("div", "frame wide");
    parts = { canvas: make("canvas", "wave"), line: make("div", "line upright") };
    parts.canvas.setAttribute("role", "img");
    parts.canvas.setAttribute("aria-label", "Waveform of the source");
    frame.append(parts.canvas, parts.line);
    dragged(frame, (event) => {
      const box = parts.canvas.getBoundingClientRect();
      return ((event.clientX - box.left) / box.width) * shown.whole;
    });
    return frame;
  },
  text(media) {
    const words = scrollable(make("div", "words"), "Text of the source");
    const bytes = decode(media.bytes);
    // Bytes that are no UTF-8 are shown one character each, so that a place in the text is a byte.
    const toText = media.is_utf8 ? (part) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(part) : (part) => Array.from(part, (value) => (value > 31 && value < 127 ? String.fromCharCode(value) : "·")).join("");
    parts = { words, bytes, toText, kept: make("span", "kept"), caret: make("span", "caret"), rest: make("span", "rest") };
    words.append(parts.kept, parts.caret, parts.rest);
    words.addEventListener("click", (event) => {
      const place = document.caretPositionFromPoint?.(event.clientX, event.clientY) ?? document.caretRangeFromPoint?.(event.clientX, event.clientY);
      if (!place) return;
      const node = place.offsetNode ?? place.startContainer;
      const index = place.offset ?? place.startOffset;
      const before = parts.rest.contains(node) ? parts.kept.textContent + node.textContent.slice(0, index) : parts.kept.contains(node) ? node.textContent.slice(0, index) : null;
      if (before !== null) moveTo(media.is_utf8 ? new TextEncoder().encode(before).length : before.length, true);
    });
    return words;
  },
};

const MOVE = {
  image() {
    const part = (cut / shown.whole) * 100;
    const [near, far] = shown.upside_down ? ["bottom", "top"] : ["top", "bottom"];
    parts.line.style.inset = parts.shade.style.inset = "auto 0";
    parts.line.style[near] = `calc(${part}% - 1px)`;
    parts.shade.style[near] = `${part}%`;
    parts.shade.style[far] = "0";
  },
  audio() {
    wave(parts.canvas, shown.media, () => {
      const style = getComputedStyle(root);
      const [kept, rest] = ["--color-accent", "--neutral-400"].map((name) => style.getPropertyValue(name));
      return (part) => (part * shown.whole < cut ? kept : rest);
    });
    parts.line.style.left = `calc(${(cut / shown.whole) * 100}% - 1px)`;
  },
  text() {
    const { bytes, toText } = parts;
    parts.kept.textContent = toText(bytes.subarray(0, cut));
    parts.rest.textContent = toText(bytes.subarray(Math.min(cut, bytes.length))) + (shown.media.is_all ? "" : " …");
    parts.words.scrollTop = parts.caret.offsetTop - parts.words.clientHeight / 2;
  },
};

function draw() {
  const value = props.value;
  if (!value) return;
  message.hidden = Boolean(value.media) || (value.cut !== undefined && shown !== null);
  source.hidden = !message.hidden;
  if (value.title) {
    message.classList.toggle("error", value.state === "error");
    message.querySelector("strong").textContent = value.title;
    message.querySelector("p").textContent = value.text;
    shown = null;
  }
  if (value.media) {
    shown = value;
    stage.replaceChildren(DRAW[value.kind](value.media));
    range.min = 0;
    range.max = value.count - (value.count % value.unit);
    range.step = value.unit;
    number.max = value.count;
    number.step = value.unit;
    root.querySelector(".of").textContent = `of ${value.whole.toLocaleString("en")}`;
  }
  if (value.cut !== undefined && shown) {
    moveTo(value.cut, false);
    root.querySelector(".says").textContent = value.says;
  }
  element.dataset.state = value.state ?? "done";
  element.dataset.cut = cut;
}

range.addEventListener("input", () => moveTo(Number(range.value), false));
range.addEventListener("change", () => moveTo(Number(range.value), true));
number.addEventListener("change", () => moveTo(Number(number.value), true));
bytes.onTheme(() => shown && MOVE[shown.kind]());
watch("value", draw);
draw();
