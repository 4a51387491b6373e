// The samples of a completion: what is being made as it comes, and the finished files.
// A card is kept between updates, so pictures and players do not flicker while others are still being made.
const { decode, make, scrollable, wave } = bytes;
const root = element.querySelector("section");
// Least and largest width of a card, CSS pixels; pictures share a row by five at most.
const WIDTHS = { image: [200, 420], audio: [560, 1200], text: [400, 900] };
const GAP = 18;
const SMALL = 128; // pixels of a picture's longer side
const BLOCK = 500; // characters of a text that are laid out together, and those up to the end of their line
let cards = new Map();

/** Pixels into their place; what is not made yet stays see-through. */
function drawPicture(canvas, { width, height, left, top, box_width, rgba }) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.classList.toggle("small", Math.max(width, height) <= SMALL);
  if (!rgba) return;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(decode(rgba)), box_width), left, top);
}

const MEDIA = {
  image(box, media, label) {
    const canvas = box.querySelector("canvas") ?? box.appendChild(make("canvas", "picture"));
    drawPicture(canvas, media);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    const line = box.querySelector(".cut") ?? box.appendChild(make("div", "cut"));
    line.style.top = `${(media.upside_down ? 1 - media.kept : media.kept) * 100}%`;
    line.hidden = media.kept <= 0 || media.kept >= 1;
  },
  audio(box, media, label) {
    const canvas = box.querySelector("canvas") ?? box.appendChild(make("canvas", "wave"));
    wave(canvas, media, () => {
      const style = getComputedStyle(root);
      const [kept, made] = ["--body-text-color-subdued", "--made-colour"].map((name) => style.getPropertyValue(name));
      return (part) => (part < media.kept ? kept : made);
    });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
  },
  text(box, media, label, title) {
    const text = box.querySelector(".words") ?? box.appendChild(scrollable(make("div", "words"), `Text of ${title}`));
    if ("kept_text" in media) {
      const whole = make("div");
      whole.append(make("span", "kept", media.kept_text), make("span", "made"));
      text.replaceChildren(whole);
    }
    const made = text.querySelector(".made");
    if (media.is_anew) made.replaceChildren();
    addText(made, media.new_text);
    shorten(made, media.most);
  },
};

/** Puts a text behind what is there: in blocks, so that what stands above is not laid out again. */
function addText(made, text) {
  while (text) {
    const last = made.lastElementChild;
    const isOpen = last && !(last.textContent.length >= BLOCK && last.textContent.endsWith("\n"));
    const block = isOpen ? last : made.appendChild(make("span", "lines"));
    const end = text.indexOf("\n", Math.max(0, BLOCK - block.textContent.length - 1)) + 1 || text.length;
    block.append(text.slice(0, end));
    text = text.slice(end);
  }
}

/** Takes away the beginning of a text that has more than `most` characters without it. */
function shorten(made, most) {
  for (let length = made.textContent.length; ; ) {
    const block = made.firstElementChild;
    length -= block?.firstChild.length;
    if (!(length > most)) return;
    block.firstChild.remove();
    if (!block.firstChild) block.remove();
    if (made.firstChild === made.firstElementChild) made.prepend("…");
  }
}

/** Writes a text only where another one stands: each writing makes the browser lay out anew. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function makeCard(id) {
  const card = make("article", "card");
  card.dataset.id = id;
  card.append(make("h2"), make("div", "media"), make("div", "progress"), make("div", "caption"), make("div", "actions"));
  card.children[2].append(make("div", "fill"));
  card.children[1].addEventListener("click", (event) => pick(card, id, event));
  return card;
}

function updateCard(card, item) {
  const [title, media, progress, caption, actions] = card.children;
  say(title, item.title);
  if (card.dataset.kind !== item.kind) media.replaceChildren();
  card.dataset.kind = item.kind;
  media.className = `media ${item.kind}`;
  if (item.media) MEDIA[item.kind](media, item.media, `${item.title}. ${item.caption}`, item.title);
  progress.hidden = item.done >= 1;
  progress.firstElementChild.style.width = `${item.done * 100}%`;
  say(caption, item.caption);
  const files = item.files ?? [];
  const urls = files.map((file) => file.file.url).join(" ");
  if (card.dataset.urls !== urls) actions.replaceChildren(...(files.length ? downloads(item) : []));
  card.dataset.urls = urls;
  card.classList.toggle("pickable", files.length > 0);
  media.title = files.length ? "Click a place to see what else could stand there" : "";
}

/** Tells the server at which place of a finished sample somebody has clicked. */
function pick(card, id, event) {
  const canvas = event.target.closest("canvas");
  if (!card.classList.contains("pickable")) return;
  if (canvas) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    const place = canvas.classList.contains("wave") ? x : Math.floor(y * canvas.height) * canvas.width + Math.floor(x * canvas.width);
    trigger("pick", { id, place });
    return;
  }
  const caret = document.caretPositionFromPoint?.(event.clientX, event.clientY) ?? document.caretRangeFromPoint?.(event.clientX, event.clientY);
  const node = caret?.offsetNode ?? caret?.startContainer;
  const made = card.querySelector(".made");
  if (!node || !made?.contains(node)) return;
  // Counted from the end, because of a long text only the end is here.
  const rest = document.createRange();
  rest.setStart(node, caret.offset ?? caret.startOffset);
  rest.setEndAfter(made);
  trigger("pick", { id, place: Array.from(rest.toString()).length });
}

/** The links to the files of a finished sample, after a player if it is a sound, and a way to the alternatives without a mouse. */
function downloads(item) {
  const links = item.files.map(({ name, file_name, file }) => {
    const link = make("a", "", name);
    Object.assign(link, { href: file.url, download: file_name, title: file_name });
    link.setAttribute("aria-label", `${name} ${file_name}`);
    return link;
  });
  const button = make("button", "quiet", "Alternatives");
  button.type = "button";
  button.addEventListener("click", () => trigger("pick", { id: item.id, place: -1 }));
  if (item.kind === "audio") links.unshift(Object.assign(make("audio"), { src: item.files[0].file.url, controls: true, preload: "metadata" }));
  return [...links, button];
}

function draw() {
  const value = props.value;
  if (value.state !== "done") {
    const box = make("div", "message");
    box.append(make("strong", "", value.title), make("p", "", value.text));
    root.replaceChildren(box);
    cards = new Map();
  } else {
    const before = cards;
    cards = new Map(value.items.map((item) => [item.id, before.get(item.id) ?? makeCard(item.id)]));
    for (const item of value.items) updateCard(cards.get(item.id), item);
    for (const child of [...root.children]) if (cards.get(child.dataset.id) !== child) child.remove();
    // A card that is moved stops playing, so the others are put around it.
    [...cards.values()].forEach((card, i) => root.children[i] !== card && root.insertBefore(card, root.children[i] ?? null));
  }
  element.dataset.state = value.state;
  layOut();
}

/** As few rows as the cards need, and those filled evenly: four samples are four in a row or two by two, never three and one. */
function layOut() {
  const kind = [...cards.values()][0]?.dataset.kind;
  if (!kind || !root.clientWidth) return;
  const width = root.clientWidth;
  const [narrow, largest] = WIDTHS[kind];
  const least = kind === "image" ? Math.max(width / 5, Math.min(narrow, (width - GAP) / 2)) : narrow;
  const rows = Math.ceil(cards.size / Math.max(1, Math.floor((width + GAP) / (least + GAP))));
  root.style.gridTemplateColumns = `repeat(${Math.ceil(cards.size / rows)}, minmax(0, ${largest}px))`;
}

new ResizeObserver(layOut).observe(root);
bytes.onTheme(() => {
  for (const canvas of root.querySelectorAll("canvas.wave")) canvas.draw();
});
watch("value", draw);
draw();
