// What every part of the page shares: colour tables, text of bytes, the tooltip, sharp canvases and virtual rows.
// The text is put in front of every view's own script; the first one to run makes the library, the others find it.
const bytes = (window.byteViews ??= (() => {
  const decode = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const PALETTES = Object.fromEntries(Object.entries(@palettes@).map(([name, table]) => [name, decode(table)])); // 256 times R, G, B
  const linear = (channel) => (channel / 255) ** 2.2;
  // From this luminance on black has more contrast than white.
  const ink = ([r, g, b]) => (0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.18 ? "#000000" : "#ffffff");
  const number = (value) => value.toLocaleString("en");
  const hex = (value, digits) => value.toString(16).padStart(digits, "0");

  /** An element with a class and a text; a text is never read as HTML. */
  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /** A text that may be longer than its box: it can be scrolled with the keyboard too. */
  function scrollable(node, label) {
    node.tabIndex = 0;
    node.setAttribute("role", "region");
    node.setAttribute("aria-label", label);
    return node;
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

  /** The byte at which the character begins that a byte is a part of. */
  function characterStart(values, offset) {
    for (let back = Math.min(3, offset); back > 0; back--) {
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

  /** Sizes `canvas` to CSS pixels on a screen of any density and returns its cleared context. */
  function fit(canvas, width, height) {
    const density = window.devicePixelRatio || 1;
    const [fullWidth, fullHeight] = [Math.round(width * density), Math.round(height * density)];
    const context = canvas.getContext("2d");
    if (canvas.width === fullWidth && canvas.height === fullHeight) {
      context.resetTransform();
      context.clearRect(0, 0, fullWidth, fullHeight);
    } else {
      Object.assign(canvas, { width: fullWidth, height: fullHeight });
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    context.scale(density, density);
    return context;
  }

  /** A waveform: lowest and highest sample of each of `columns` columns as far as they are there, sharp at every size.
   *  `look` gives, each time it is drawn, a function from a place, 0 to 1, to its colour. */
  function wave(canvas, { low, high, columns }, look) {
    const [lows, highs] = [low, high].map((values) => new Int8Array(decode(values).buffer));
    if (!canvas.draw) new ResizeObserver(() => canvas.draw()).observe(canvas);
    canvas.draw = () => {
      const density = window.devicePixelRatio || 1;
      const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((length) => Math.round(length * density));
      if (!width) return;
      Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      const colourOf = look();
      const [middle, edge] = [height / 2, (column) => Math.round((column / columns) * width)];
      for (let column = 0; column < lows.length; column++) {
        context.fillStyle = colourOf(column / columns);
        const left = edge(column);
        const tall = Math.max(1.5 * density, ((highs[column] - lows[column]) / 128) * middle);
        context.fillRect(left, middle - (highs[column] / 128) * middle, Math.max(1, edge(column + 1) - left), tall);
      }
    };
    canvas.draw();
  }

  /** The cursor's frame: white in black, so that it stands out from every colour of the scale. */
  function frame(context, x, y, width, height) {
    for (const [colour, inset] of [["#000000", 0], ["#ffffff", 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = 1.5;
      context.strokeRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
    }
  }

  /** Lines across a cell: its byte had little context. */
  function hatch(context, x, y, width, height) {
    context.save();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    for (const [colour, shift] of [["rgb(0 0 0 / 35%)", 0], ["rgb(255 255 255 / 50%)", 1.2]]) {
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.beginPath();
      for (let at = x - height; at < x + width; at += 8) {
        context.moveTo(at + shift, y + height);
        context.lineTo(at + shift + height, y);
      }
      context.stroke();
    }
    context.restore();
  }

  /** The mark of a selected cell. */
  function underline(context, x, y, width, colour) {
    context.fillStyle = colour;
    context.fillRect(x, y, width, 3);
  }

  /** Rows of a list that may be millions long: only those in sight are drawn, on one canvas that stays in place. */
  class VirtualRows {
    static TALLEST = 8e6; // CSS pixels; browsers clip taller elements, so longer lists scroll faster than they draw
    constructor(scroller, rowHeight, draw) {
      Object.assign(this, { scroller, rowHeight, draw, count: 0, speed: 1 });
      this.canvas = scroller.querySelector("canvas");
      this.spacer = scroller.querySelector(".spacer");
      scroller.addEventListener("scroll", () => (this.frame ??= requestAnimationFrame(() => this.paint())));
    }
    resize(count) {
      this.count = count;
      const full = count * this.rowHeight;
      const height = Math.min(full, VirtualRows.TALLEST);
      const sight = this.scroller.clientHeight;
      this.speed = full > height ? (full - sight) / (height - sight) : 1;
      this.spacer.style.height = `${height}px`;
    }
    /** Pixels of the full list above the upper edge; a list that scrolls faster than it draws stops at whole rows. */
    get top() {
      const top = this.scroller.scrollTop * this.speed;
      return this.speed > 1 ? Math.floor(top / this.rowHeight) * this.rowHeight : top;
    }
    get first() {
      return Math.floor(this.top / this.rowHeight);
    }
    paint() {
      this.frame = undefined;
      const { clientWidth: width, clientHeight: height } = this.scroller;
      if (!width || !this.count) return;
      const started = performance.now();
      const context = fit(this.canvas, width, height);
      context.textBaseline = "middle";
      const last = Math.min(this.count, this.first + Math.ceil(height / this.rowHeight) + 1);
      const { top } = this;
      for (let row = this.first; row < last; row++) this.draw(context, row, row * this.rowHeight - top);
      this.scroller.dataset.drawms = (performance.now() - started).toFixed(2);
    }
    rowAt(event) {
      return Math.floor((this.top + event.clientY - this.canvas.getBoundingClientRect().top) / this.rowHeight);
    }
    show(row) {
      const inSight = Math.floor(this.scroller.clientHeight / this.rowHeight);
      if (row * this.rowHeight < this.top || row >= this.first + inSight) {
        this.scroller.scrollTop = (Math.max(0, row - inSight / 2) * this.rowHeight) / this.speed;
      }
      this.paint();
    }
  }

  /** Calls `act` whenever the page turns dark or light, by the system's wish or by its own switch. */
  function onTheme(act) {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", act);
    new MutationObserver(act).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  const colours = (element) => {
    const style = getComputedStyle(element);
    return { text: style.color, faint: style.getPropertyValue("--body-text-color-subdued") || style.color };
  };

  return {
    PALETTES, VirtualRows, characterStart, colours, decode, decodeAt, fit, frame, hatch, hex, ink, make, number, onTheme, scrollable, tooltip, underline, visible, wave,
  };
})());
