// The colour scale, and one line about the byte under the cursor for eyes and screen readers alike.
const status = element.querySelector(".status");
const scale = element.querySelector("canvas");
const HINT = "Click a byte in any view, or move with the arrow keys.";
let file = null;

scale.width = 256;
scale.height = 1;
element.querySelector(".clipped").style.background = bytes.css[bytes.CLIPPED];
for (let index = 0; index < bytes.CLIPPED; index++) {
  const context = scale.getContext("2d");
  context.fillStyle = bytes.css[index];
  context.fillRect(index, 0, 1, 1);
}

bytes.onCursor((offset) => {
  if (file && offset < file.count) status.textContent = file.describe(offset);
});
bytes.follow(element, props, watch, null, (document) => {
  file = document;
  status.textContent = HINT;
});
