// The open file, and what all views show of it: measure, colours, cursor and selection. The views listen, the book tells.
const BITS_UNIT = 1024; // the sidecar stores bits as integers of 1/1024 bit
const LIKELIEST = 5;
const LIKELIEST_UNIT = 16; // and those of the likeliest bytes as integers of 1/16 bit
const LIKELIEST_BLOCK = 4096; // places fetched at once
const LITTLE_CONTEXT = 64; // bytes; below it a byte is hatched, because the model had next to nothing to go by
const [ABOVE, BELOW, NONE] = [256, 257, 258]; // colours after the 256 of a table

/** One scored file; every array is in media order, so pixel rows, samples and characters follow each other. */
class ByteDocument {
  constructor(value, buffer, likeliest) {
    Object.assign(this, value);
    const { count, num_samples: numSamples } = this;
    let at = 0;
    const next = (Type, length) => {
      const array = new Type(buffer, at, length);
      at += array.byteLength;
      return array;
    };
    this.units = next(Uint16Array, count);
    this.entropyUnits = next(Uint16Array, count);
    this.context = next(Uint16Array, count);
    this.samples = next(Int16Array, numSamples);
    this.values = next(Uint8Array, count);
    this.ranks = next(Uint8Array, count);
    this.blocks = new Map(); // number of a block -> its bytes, or the promise of them
    this.allLikeliest = likeliest;
  }
  bits(offset) {
    return this.units[offset] / BITS_UNIT;
  }
  entropy(offset) {
    return this.entropyUnits[offset] / BITS_UNIT;
  }
  isHatched(offset) {
    return this.context[offset] < LITTLE_CONTEXT;
  }
  /** The five likeliest bytes at a place, `{value, p}`, or a promise of them while they are fetched. */
  likeliest(offset) {
    const number = Math.floor(offset / LIKELIEST_BLOCK);
    const block = this.blocks.get(number) ?? this.fetchBlock(number);
    if (block instanceof Promise) return block.then((found) => (found ? this.likeliest(offset) : []));
    const at = 2 * LIKELIEST * (offset - number * LIKELIEST_BLOCK);
    return Array.from({ length: block.length ? LIKELIEST : 0 }, (_, i) => ({ value: block[at + i], p: 2 ** (-block[at + LIKELIEST + i] / LIKELIEST_UNIT) }));
  }
  fetchBlock(number) {
    const [start, end] = [number, number + 1].map((n) => 2 * LIKELIEST * Math.min(this.count, n * LIKELIEST_BLOCK));
    const read = async () => {
      if (!this.likeliest_file) return this.allLikeliest.subarray(start, end);
      const answer = await fetch(this.likeliest_file.url, { headers: { Range: `bytes=${start}-${end - 1}` } });
      if (answer.status !== 206) throw new Error(`the likeliest bytes could not be read (${answer.status})`);
      return new Uint8Array(await answer.arrayBuffer());
    };
    // What could not be read is asked for again the next time.
    const promise = read().then((block) => this.blocks.set(number, block), () => void this.blocks.delete(number));
    this.blocks.set(number, promise);
    return promise;
  }
  /** Where a byte lies in the media, in words; "" where the offset says it all. */
  place(offset) {
    if (this.kind === "image") {
      const pixel = Math.floor(offset / 3);
      return `x ${pixel % this.width}, y ${Math.floor(pixel / this.width)}, ${["red", "green", "blue"][offset % 3]}`;
    }
    if (this.kind === "audio") return `${(Math.floor(offset / this.bytes_per_sample) / this.sample_rate).toFixed(4)} s`;
    if (this.kind !== "text") return "";
    const { start, text } = bytes.decodeAt(this.values, bytes.characterStart(this.values, offset));
    return `“${bytes.visible(text)}”${offset > start ? " (continued)" : ""}`;
  }
}

const MEASURES = {
  bits: {
    name: "Bits", high: 8, format: (v) => `${v.toFixed(2)} bits`, ends: ["0 bits, expected", "8 bits, a blind guess"],
    line: "What the byte cost the model: −log₂ of the probability that it gave to it. Their sum is the size of a perfectly coded file.",
    fill: (file, plane) => { for (let i = 0; i < plane.length; i++) plane[i] = file.units[i] / BITS_UNIT; },
  },
  rank: {
    name: "Rank", high: 8, format: (v) => `rank ${Math.round(2 ** v)}`, ends: ["rank 1, the likeliest", "rank 256, the last"],
    line: "The byte's place among all 256 values, the likeliest first; each doubling of the rank is one step of the scale.",
    fill: (file, plane) => { for (let i = 0; i < plane.length; i++) plane[i] = Math.log2(file.ranks[i] + 1); },
  },
  entropy: {
    name: "Entropy", high: 8, format: (v) => `${v.toFixed(2)} bits`, ends: ["0 bits, certain", "8 bits, no idea"],
    line: "How many bits the model expected to need, before it saw the byte: how unsure it was.",
    fill: (file, plane) => { for (let i = 0; i < plane.length; i++) plane[i] = file.entropyUnits[i] / BITS_UNIT; },
  },
  excess: {
    name: "Bits − entropy", high: 8, isSigned: true, format: (v) => `${signed(v)} bits`, ends: ["cheaper than expected", "dearer than expected"],
    line: "What the byte cost beyond what the model expected to need: high where it was sure of itself and wrong.",
    fill: (file, plane) => { for (let i = 0; i < plane.length; i++) plane[i] = (file.units[i] - file.entropyUnits[i]) / BITS_UNIT; },
  },
  difference: {
    name: "Difference", high: 8, isSigned: true, format: (v) => `${signed(v)} bits`, ends: ["cheaper here", "dearer here"],
    line: "Bits of this file minus bits of the one it is compared with, byte by byte from the beginning.",
    fill: (file, plane, other) => {
      const both = Math.min(plane.length, other.count);
      for (let i = 0; i < both; i++) plane[i] = (file.units[i] - other.units[i]) / BITS_UNIT;
      plane.fill(NaN, both);
    },
  },
};

const signed = (value) => `${value <= -0.005 ? "−" : value >= 0.005 ? "+" : ""}${Math.abs(value).toFixed(2)}`;

/** The values of one measure and their colours. */
class Shade {
  constructor(file, other, { measure, palette, isAuto }) {
    this.measure = MEASURES[measure];
    this.plane = new Float32Array(file.count);
    this.measure.fill(file, this.plane, other);
    const { high, isSigned } = this.measure;
    [this.low, this.high] = isAuto ? this.middle() : [isSigned ? -high : 0, high];
    const table = isSigned && palette !== "grey" ? "difference" : palette;
    this.rgb = [bytes.PALETTES[table], bytes.PALETTES.beyond].flatMap((colours) => Array.from({ length: colours.length / 3 }, (_, i) => colours.subarray(3 * i, 3 * i + 3)));
    this.css = this.rgb.map((colour) => `rgb(${colour.join(",")})`);
    this.ink = this.rgb.map(bytes.ink);
    // One number a pixel, in the byte order of every machine that runs a browser.
    this.packed = Uint32Array.from(this.rgb, ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0);
  }
  /** The ends between which 98 of 100 values lie; the same distance on both sides of 0 for signed measures. */
  middle() {
    const step = Math.max(1, Math.floor(this.plane.length / 200_000));
    const some = this.plane.filter((value, i) => i % step === 0 && !Number.isNaN(value)).sort();
    if (!some.length) return [0, 1];
    const at = (share) => some[Math.min(some.length - 1, Math.floor(share * some.length))];
    if (!this.measure.isSigned) return [at(0.01), Math.max(at(0.99), at(0.01) + 0.01)];
    const far = Math.max(0.01, Math.abs(at(0.01)), Math.abs(at(0.99)));
    return [-far, far];
  }
  level(value) {
    if (Number.isNaN(value)) return NONE;
    if (value > this.high) return ABOVE;
    if (value < this.low) return BELOW;
    return Math.round(((value - this.low) / (this.high - this.low)) * 255);
  }
  /** Mean of the bytes from `start` up to `end`, and the value that lies farthest from 0. */
  span(start, end) {
    let sum = 0;
    let extreme = 0;
    for (let i = start; i < end; i++) {
      const value = this.plane[i];
      sum += value;
      if (Math.abs(value) > Math.abs(extreme)) extreme = value;
    }
    return { mean: sum / Math.max(1, end - start), extreme };
  }
}

const listeners = { items: [], document: [], shade: [], cursor: [], selection: [] };
const NONE_OPEN = { file: null, other: null, otherId: "", shade: null, cursor: -1, anchor: -1, selection: null };
const opened = new Map(); // id -> promise of a document; the last few stay

const book = {
  ...NONE_OPEN, items: [], item: null, problem: "", wish: null,
  options: { measure: "bits", palette: "viridis", isAuto: false },
  on(event, listener) {
    listeners[event].push(listener);
  },
  tell(event) {
    for (const listener of listeners[event]) listener();
  },
  open(item) {
    if (!opened.has(item.id)) {
      if (opened.size > 3) opened.delete(opened.keys().next().value);
      const promise = readDocument(item.document);
      promise.catch(() => opened.delete(item.id)); // so that it is asked for again the next time
      opened.set(item.id, promise);
    }
    return opened.get(item.id);
  },
  /** Shows another file; null shows none. */
  async choose(item) {
    Object.assign(this, { item, problem: "" });
    if (!item?.document) {
      Object.assign(this, NONE_OPEN);
      return this.tell("document");
    }
    const file = await this.open(item).catch((error) => ({ problem: error.message }));
    if (this.item !== item || this.file === file) return;
    if (file.problem) {
      Object.assign(this, NONE_OPEN, { problem: `Its views cannot be shown: ${file.problem}. Choose it again, or score it again.` });
      return this.tell("document");
    }
    Object.assign(this, NONE_OPEN, { file });
    if (this.options.measure === "difference") this.options.measure = "bits";
    this.shade = new Shade(file, null, this.options);
    this.tell("document");
  },
  /** The files that lie byte on byte with the open one. */
  comparable() {
    const { item } = this;
    const fits = ({ id, document: d }) => d && id !== item.id && d.kind === item.document.kind && d.width === item.document.width;
    return item?.document ? this.items.filter(fits) : [];
  },
  /** Compares with another file, by its id; "" ends it. The last wish counts, whichever file is read first. */
  async compare(id) {
    const item = this.items.find((candidate) => candidate.id === id);
    const { file } = this;
    const wish = (this.wish = {});
    const found = item ? await this.open(item).catch((error) => ({ problem: error.message })) : null;
    if (this.file !== file || this.wish !== wish) return;
    const problem = found?.problem ? `It cannot be compared with ${item.name}: ${found.problem}.` : "";
    const other = problem ? null : found;
    Object.assign(this, { problem, other, otherId: other ? id : "" });
    this.set({ measure: other ? "difference" : "bits" });
    this.tell("items");
  },
  set(options) {
    Object.assign(this.options, options);
    if (!this.file) return;
    this.shade = new Shade(this.file, this.other, this.options);
    this.tell("shade");
  },
  /** Moves the cursor; extending, it selects from where the cursor was set last. */
  move(offset, isExtending = false) {
    if (!this.file) return;
    const to = Math.max(0, Math.min(this.file.count - 1, offset));
    if (!isExtending) this.anchor = to;
    else if (this.anchor < 0) this.anchor = Math.max(0, this.cursor);
    if (isExtending) this.select([[Math.min(this.anchor, to), Math.max(this.anchor, to) + 1]]);
    else if (this.selection) this.select(null);
    this.cursor = to;
    this.tell("cursor");
  },
  /** Selects ranges of bytes, `[start, end)`, in order; null selects none. */
  select(ranges) {
    this.selection = ranges;
    this.tell("selection");
  },
  isSelected(offset) {
    return Boolean(this.selection?.some(([start, end]) => offset >= start && offset < end));
  },
  facts(offset) {
    const { file, other, shade } = this;
    const value = file.values[offset];
    const context = file.context[offset];
    const measured = other && shade.measure === MEASURES.difference && offset < other.count;
    return [
      `byte ${bytes.number(offset)} (0x${bytes.hex(offset, 4)})`,
      file.place(offset),
      `value ${value} (0x${bytes.hex(value, 2)})`,
      `${file.bits(offset).toFixed(2)} bits`,
      measured ? `there ${other.bits(offset).toFixed(2)} bits, difference ${signed(shade.plane[offset])}` : "",
      `rank ${file.ranks[offset] + 1} of 256`,
      `entropy ${file.entropy(offset).toFixed(2)}`,
      context ? `after ${bytes.number(context)}${context === 65535 ? " or more" : ""} bytes of context` : "without context",
    ].filter(Boolean);
  },
};

async function readDocument({ inline, ...value }) {
  if (inline) {
    const [scores, likeliest] = await Promise.all([inline.scores, inline.likeliest].map(inflate));
    return new ByteDocument(value, scores.buffer, likeliest);
  }
  const answer = await fetch(value.file.url);
  if (!answer.ok) throw new Error(`the scores could not be read (${answer.status})`);
  return new ByteDocument(value, await answer.arrayBuffer());
}

async function inflate(base64) {
  const stream = new Blob([bytes.decode(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** A byte as a person reads it: in pictures and sounds its value, elsewhere its character if it has one. */
function byteName(value) {
  if (book.file.kind === "image" || book.file.kind === "audio") return `${value}`;
  const name = { 9: "tab", 10: "new line", 13: "return", 32: "space" }[value];
  return name ?? (value > 32 && value < 127 ? String.fromCharCode(value) : `0x${bytes.hex(value, 2)}`);
}

const percent = (p) => (p >= 0.995 ? `${(100 * p).toFixed(1)}%` : p >= 0.095 ? `${Math.round(100 * p)}%` : `${(100 * p).toFixed(p < 0.0095 ? 2 : 1)}%`);

/**
 * A view of the open file: `show` a new one, `paint` new colours, `mark` cursor and selection, `reveal` a cursor that has moved.
 * It is hidden unless its kind fits. Only `reveal` scrolls, so that who has scrolled away from the cursor may stay there.
 */
function follow(element, kinds, { show, paint, mark, reveal = mark }) {
  book.on("document", () => {
    element.hidden = !book.file || (kinds && !kinds.includes(book.file.kind));
    delete element.dataset.ready;
    if (element.hidden) return;
    show();
    element.dataset.ready = book.file.id;
  });
  const ifShown = (act) => () => element.hidden || act();
  book.on("shade", ifShown(paint));
  book.on("cursor", ifShown(reveal));
  book.on("selection", ifShown(mark));
}

/** Tooltip, click, shift-click and drag: `at(event)` answers the byte under the pointer or -1. */
function pointer(target, at, drag = (from, to) => book.select([[Math.min(from, to), Math.max(from, to) + 1]])) {
  let from = -1;
  let isDragged = false;
  target.addEventListener("pointerdown", (event) => {
    from = event.pointerType === "mouse" && !event.shiftKey && event.button === 0 ? at(event) : -1;
    isDragged = false;
  });
  target.addEventListener("pointermove", (event) => {
    const offset = at(event);
    if (from >= 0 && event.buttons === 1 && offset >= 0 && offset !== from) isDragged = true;
    if (isDragged && event.buttons === 1 && offset >= 0) drag(from, offset);
    if (offset < 0) return bytes.tooltip.hide();
    hint(event, offset);
  });
  target.addEventListener("pointerleave", () => bytes.tooltip.hide());
  target.addEventListener("click", (event) => {
    const offset = at(event);
    if (offset >= 0 && !isDragged) book.move(offset, event.shiftKey);
    isDragged = false;
  });
}

bytes.onTheme(() => book.tell("shade"));

let hinted = -1;

/** The tooltip of a byte; the likeliest bytes join it as soon as they are there. */
function hint(event, offset) {
  hinted = offset;
  const facts = book.facts(offset).join("\n");
  const said = (likeliest) => (likeliest.length ? `${facts}\nlikeliest: ${likeliest.map(({ value, p }) => `${byteName(value)} ${percent(p)}`).join("  ")}` : facts);
  const found = book.file.likeliest(offset);
  if (!(found instanceof Promise)) return bytes.tooltip.show(event, said(found));
  bytes.tooltip.show(event, facts);
  found.then((likeliest) => {
    if (hinted === offset && !bytes.tooltip.element.hidden) bytes.tooltip.show(event, said(likeliest));
  });
}

/** Arrow and page keys on `target` move `steps()[key]` bytes; with shift they select; Escape selects nothing. */
function arrowKeys(target, steps) {
  target.addEventListener("keydown", (event) => {
    if (!book.file) return;
    if (event.key === "Escape" && book.selection) return book.select(null);
    const step = steps()[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    book.move(Math.max(0, book.cursor) + step, event.shiftKey);
  });
}
