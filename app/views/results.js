// Source and samples side by side: what is kept, what is being made as it comes, and the finished files.
// A card is kept between updates, so pictures and players do not flicker while others are still being made.
const root = element.querySelector("section");
const WAVE = { width: 560, height: 96 }; // canvas pixels
let cards = new Map();

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const decode = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

/** RGB rows into a canvas; pixels that are not made yet stay see-through. */
function drawPicture(canvas, { width, height, rgb, alpha }) {
  const colours = decode(rgb);
  const opacity = decode(alpha);
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    image.data.set(colours.subarray(3 * pixel, 3 * pixel + 3), 4 * pixel);
    image.data[4 * pixel + 3] = opacity[pixel];
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Lowest and highest sample of each column; columns after `kept` are new. */
function drawWave(canvas, { low, high, kept }) {
  const lows = new Int8Array(decode(low).buffer);
  const highs = new Int8Array(decode(high).buffer);
  const style = getComputedStyle(root);
  canvas.width = WAVE.width;
  canvas.height = WAVE.height;
  const context = canvas.getContext("2d");
  const middle = WAVE.height / 2;
  for (let column = 0; column < lows.length; column++) {
    const isKept = column < kept * WAVE.width;
    context.fillStyle = style.getPropertyValue(isKept ? "--body-text-color-subdued" : "--made-colour");
    context.fillRect(column, middle - (highs[column] / 128) * middle, 1, Math.max(1.5, ((highs[column] - lows[column]) / 128) * middle));
  }
  context.fillStyle = style.getPropertyValue("--border-color-primary");
  context.fillRect(0, middle, WAVE.width, 1);
}

const MEDIA = {
  image(box, media, label) {
    const canvas = box.querySelector("canvas") ?? box.appendChild(make("canvas", "picture"));
    drawPicture(canvas, media);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    const line = box.querySelector(".cut") ?? box.appendChild(make("div", "cut"));
    line.style.top = `${media.kept * 100}%`;
    line.hidden = media.kept >= 1;
  },
  audio(box, media, label) {
    const canvas = box.querySelector("canvas") ?? box.appendChild(make("canvas", "wave"));
    drawWave(canvas, media);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
  },
  text(box, media) {
    const text = box.querySelector("p") ?? box.appendChild(make("p", "words"));
    text.replaceChildren(make("span", "kept", media.kept_text), make("span", "made", media.made_text));
    text.scrollTop = text.scrollHeight;
  },
};

function makeCard() {
  const card = make("article", "card");
  card.append(make("h3"), make("div", "media"), make("div", "progress"), make("div", "caption"), make("div", "actions"));
  card.children[2].append(make("div", "fill"));
  return card;
}

function updateCard(card, item) {
  const [title, media, progress, caption, actions] = card.children;
  title.textContent = item.title;
  if (card.dataset.kind !== item.kind) media.replaceChildren();
  card.dataset.kind = item.kind;
  media.className = `media ${item.kind}`;
  if (item.media) MEDIA[item.kind](media, item.media, `${item.title}. ${item.caption}`);
  progress.hidden = item.done >= 1;
  progress.firstElementChild.style.width = `${item.done * 100}%`;
  caption.textContent = item.caption;
  const url = item.file?.url ?? "";
  if (card.dataset.url !== url) actions.replaceChildren(...(url ? downloads(item, url) : []));
  card.dataset.url = url;
}

/** The link to a finished file, after a player if it is a sound. */
function downloads(item, url) {
  const link = make("a", "", `Download ${item.name}`);
  Object.assign(link, { href: url, download: item.name });
  if (item.kind !== "audio") return [link];
  return [Object.assign(make("audio"), { src: url, controls: true, preload: "metadata" }), link];
}

function draw() {
  const value = props.value;
  if (value.state === "empty") {
    const box = make("div", "message");
    box.append(make("strong", "", value.title), make("p", "", value.text));
    root.replaceChildren(box);
    cards = new Map();
  } else {
    const before = cards;
    cards = new Map(value.items.map((item) => [item.id, before.get(item.id) ?? makeCard()]));
    for (const item of value.items) updateCard(cards.get(item.id), item);
    if (cards.size !== root.children.length || [...cards.values()].some((card, i) => root.children[i] !== card)) {
      root.replaceChildren(...cards.values());
    }
  }
  element.dataset.state = value.state;
}

watch("value", draw);
draw();
