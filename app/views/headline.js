// The totals of the open file beside other ways to store the same bytes, and what exactly was scored.
const UNIFORM = 8; // bits per byte of random bytes

function bar(name, bits, longest, isModel) {
  const row = bytes.make("div", isModel ? "bar model" : "bar");
  const track = bytes.make("div", "track");
  track.append(bytes.make("div", "fill"));
  track.firstElementChild.style.width = `${(bits / longest) * 100}%`;
  row.append(bytes.make("span", "name", name), track, bytes.make("span", "figure", bits.toFixed(2)));
  return row;
}

function draw() {
  const item = book.items.find(({ id }) => id === book.item?.id);
  if (!item?.document) return element.replaceChildren();
  const head = bytes.make("div", "number");
  head.append(bytes.make("strong", "", item.bits_per_byte.toFixed(3)), bytes.make("span", "", "bits per byte"));
  const totals = bytes.make("div", "totals");
  const facts = [...(book.problem ? [book.problem] : []), item.facts, ...item.notes].map((fact) => bytes.make("p", "facts", fact.replace(/[^.]$/, "$&.")));
  totals.append(head, bytes.make("p", "subtitle", `${item.name}: ${item.what}`), ...facts);
  const bars = bytes.make("div", "bars");
  const coders = (item.references ?? []).map(({ name, bytes: count }) => [name, (8 * count) / item.num_bytes]);
  const others = [...coders, ["random bytes", UNIFORM]];
  const longest = Math.max(item.bits_per_byte, ...others.map(([, bits]) => bits));
  bars.append(bar(item.model, item.bits_per_byte, longest, true), ...others.map(([name, bits]) => bar(name, bits, longest)));
  element.replaceChildren(totals, bars);
}

book.on("items", draw);
book.on("document", draw);
