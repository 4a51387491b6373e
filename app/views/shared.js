// What all byte views of the page share: the palette, the scored document, the cursor, the tooltip and virtual rows.
// The text is put in front of every view's own script; the first one to run makes the library, the others find it.
const bytes = (window.byteViews ??= (() => {
  const PALETTE = Uint8Array.from(atob("@palette@"), (c) => c.charCodeAt(0)); // 256 times R, G, B, and the clipped colour
  const MAX_BITS = 8; // end of the fixed scale; a uniform random byte costs exactly this much
  const BITS_UNIT = 1024; // the sidecar stores bits as integers of 1/1024 bit
  const CLIPPED = 256; // palette index of everything beyond the scale

  const level = (bits) => (bits > MAX_BITS ? CLIPPED : Math.round((bits / MAX_BITS) * 255));
  const rgb = (index) => PALETTE.subarray(3 * index, 3 * index + 3);
  const css = Array.from({ length: CLIPPED + 1 }, (_, i) => `rgb(${rgb(i).join(",")})`);
  const linear = (channel) => (channel / 255) ** 2.2;
  const ink = Array.from({ length: CLIPPED + 1 }, (_, i) => {
    const [r, g, b] = rgb(i);
    // From this luminance on black has more contrast than white.
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.18 ? "#000000" : "#ffffff";
  });
  const number = (value) => value.toLocaleString("en");
  const hex = (value, digits) => value.toString(16).padStart(digits, "0");

  /** One scored file: `values` and `bits` in media order, so pixel rows, samples and characters follow each other. */
  class ByteDocument {
    constructor(value, buffer) {
      Object.assign(this, value);
      const bitsAt = this.count + (this.count % 2);
      this.values = new Uint8Array(buffer, 0, this.count);
      this.units = new Uint16Array(buffer, bitsAt, this.count);
      this.samples = new Int16Array(buffer, bitsAt + 2 * this.count, this.num_samples);
    }
    bits(offset) {
      return this.units[offset] / BITS_UNIT;
    }
    /** Mean and largest bits of the bytes from `start` up to `end`. */
    span(start, end) {
      let sum = 0;
      let max = 0;
      for (let i = start; i < end; i++) {
        sum += this.units[i];
        if (this.units[i] > max) max = this.units[i];
      }
      return { mean: sum / Math.max(1, end - start) / BITS_UNIT, max: max / BITS_UNIT };
    }
    /** One line about a byte: where it is, what it holds and what it cost. */
    describe(offset) {
      const value = this.values[offset];
      const place = { image: "pixel", audio: "time", text: "character" }[this.kind];
      return [
        `byte ${number(offset)}`,
        place && this[place](offset),
        `value ${value} (0x${hex(value, 2)})`,
        `${this.bits(offset).toFixed(2)} bits`,
      ].filter(Boolean).join("  ·  ");
    }
    pixel(offset) {
      const at = Math.floor(offset / 3);
      return `x ${at % this.width}, y ${Math.floor(at / this.width)}, ${["red", "green", "blue"][offset % 3]}`;
    }
    time(offset) {
      return `${(Math.floor(offset / this.bytes_per_sample) / this.sample_rate).toFixed(4)} s`;
    }
    character(offset) {
      const { start, text } = decodeAt(this.values, characterStart(this.values, offset));
      return `“${visible(text)}”${offset > start ? " (continued)" : ""}`;
    }
  }

  /** The UTF-8 character that begins at `start`; a byte that begins none is one replacement character. */
  function decodeAt(values, start) {
    const first = values[start];
    const size = first < 0x80 ? 1 : first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
    if (size === 1) return { start, size, text: String.fromCharCode(first) };
    if (size > 1 && start + size <= values.length) {
      try {
        return { start, size, text: strictUtf8.decode(values.subarray(start, start + size)) };
      } catch {
        // Not UTF-8 here: fall through to the replacement character.
      }
    }
    return { start, size: 1, text: "\ufffd" };
  }
  const strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  function characterStart(values, offset) {
    for (let back = 0; back < 4 && back <= offset; back++) {
      if (decodeAt(values, offset - back).size > back) return offset - back;
    }
    return offset;
  }

  /** Control characters as signs that can be seen; everything else as it is. */
  function visible(text) {
    const code = text.codePointAt(0);
    if (code === 10) return "↵";
    if (code === 9) return "⇥";
    if (code < 32) return String.fromCharCode(0x2400 + code);
    if (code >= 127 && code < 160) return "\u2421";
    return text;
  }

  const opened = new Map(); // sidecar URL -> promise; all views of one value share one download
  function open(value) {
    const url = value.file.url;
    if (!opened.has(url)) {
      if (opened.size > 2) opened.delete(opened.keys().next().value);
      opened.set(url, fetch(url).then(async (answer) => {
        if (!answer.ok) throw new Error(`the scores could not be read (${answer.status})`);
        return new ByteDocument(value, await answer.arrayBuffer());
      }));
    }
    return opened.get(url);
  }

  /** Calls `show(document)` for each value the view has a part in, and hides the view for all others. */
  function follow(element, props, watch, kinds, show) {
    const load = async () => {
      const value = props.value;
      const wanted = Boolean(value) && (!kinds || kinds.includes(value.kind));
      element.firstElementChild.hidden = !wanted;
      delete element.dataset.ready;
      if (!wanted) return;
      const document = await open(value);
      if (props.value !== value) return; // a newer file came while this one was read
      show(document);
      element.dataset.ready = value.id;
    };
    watch("value", load);
    load();
  }

  const moveCursor = (offset) => window.dispatchEvent(new CustomEvent("byteviews:cursor", { detail: { offset } }));
  const onCursor = (listener) => window.addEventListener("byteviews:cursor", (event) => listener(event.detail.offset));

  /** Arrow and page keys on `target` move `step(key)` bytes from the cursor that `position()` returns. */
  function arrowKeys(target, steps, position, count) {
    target.addEventListener("keydown", (event) => {
      const step = steps()[event.key];
      if (step === undefined) return;
      event.preventDefault();
      moveCursor(Math.max(0, Math.min(count() - 1, Math.max(0, position()) + step)));
    });
  }

  const tooltip = {
    element: null,
    show(event, text) {
      if (!this.element) {
        this.element = window.document.createElement("div");
        this.element.className = "byte-tooltip";
        this.element.setAttribute("role", "tooltip");
        window.document.body.append(this.element);
      }
      this.element.textContent = text;
      this.element.hidden = false;
      const { offsetWidth: width, offsetHeight: height } = this.element;
      const left = Math.min(event.clientX + 14, innerWidth - width - 8);
      const below = event.clientY + 18;
      this.element.style.left = `${Math.max(8, left)}px`;
      this.element.style.top = `${below + height > innerHeight ? event.clientY - height - 12 : below}px`;
    },
    hide() {
      if (this.element) this.element.hidden = true;
    },
  };

  /** Tooltip and click of a canvas: `at(event)` answers the byte under the pointer or -1. */
  function pointer(target, at, describe) {
    target.addEventListener("pointermove", (event) => {
      const offset = at(event);
      if (offset < 0) tooltip.hide();
      else tooltip.show(event, describe(offset));
    });
    target.addEventListener("pointerleave", () => tooltip.hide());
    target.addEventListener("click", (event) => {
      const offset = at(event);
      if (offset >= 0) moveCursor(offset);
    });
  }

  /** Sizes `canvas` to CSS pixels on a screen of any density and returns its cleared context. */
  function fit(canvas, width, height) {
    const density = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * density);
    canvas.height = Math.round(height * density);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(density, density);
    return context;
  }

  /** The cursor's frame: white in black, so that it stands out from every colour of the scale. */
  function frame(context, x, y, width, height) {
    for (const [colour, inset] of [["#000000", 0], ["#ffffff", 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = 1.5;
      context.strokeRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
    }
  }

  /** Rows of a list that may be millions long: only those in sight are drawn, on one canvas that stays in place. */
  class VirtualRows {
    static TALLEST = 8e6; // CSS pixels; browsers clip taller elements, so longer lists scroll faster than they draw
    constructor(scroller, rowHeight, draw) {
      Object.assign(this, { scroller, rowHeight, draw, count: 0, speed: 1 });
      this.canvas = scroller.querySelector("canvas");
      this.spacer = scroller.querySelector(".spacer");
      scroller.addEventListener("scroll", () => requestAnimationFrame(() => this.paint()));
      this.themeQuery = matchMedia("(prefers-color-scheme: dark)");
      this.themeQuery.addEventListener("change", () => this.paint());
    }
    resize(count) {
      this.count = count;
      const full = count * this.rowHeight;
      const height = Math.min(full, VirtualRows.TALLEST);
      const sight = this.scroller.clientHeight;
      this.speed = full > height ? (full - sight) / (height - sight) : 1;
      this.spacer.style.height = `${height}px`;
    }
    get first() {
      return Math.floor((this.scroller.scrollTop * this.speed) / this.rowHeight);
    }
    paint() {
      const { clientWidth: width, clientHeight: height } = this.scroller;
      if (!width || !this.count) return;
      const started = performance.now();
      const context = fit(this.canvas, width, height);
      context.textBaseline = "middle";
      const last = Math.min(this.count, this.first + Math.ceil(height / this.rowHeight) + 1);
      for (let row = this.first; row < last; row++) this.draw(context, row, (row - this.first) * this.rowHeight);
      this.scroller.dataset.drawms = (performance.now() - started).toFixed(2);
    }
    rowAt(event) {
      return this.first + Math.floor((event.clientY - this.canvas.getBoundingClientRect().top) / this.rowHeight);
    }
    show(row) {
      const inSight = Math.floor(this.scroller.clientHeight / this.rowHeight);
      if (row < this.first || row >= this.first + inSight) {
        this.scroller.scrollTop = (Math.max(0, row - inSight / 2) * this.rowHeight) / this.speed;
      }
      this.paint();
    }
  }

  const colours = (element) => {
    const style = getComputedStyle(element);
    return { text: style.color, faint: style.getPropertyValue("--body-text-color-subdued") || style.color };
  };

  return {
    CLIPPED, VirtualRows, arrowKeys, colours, css, decodeAt, fit, follow, frame, hex, ink, level, moveCursor, number,
    onCursor, pointer, rgb, visible,
  };
})());
