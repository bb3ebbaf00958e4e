"use strict";
// Each caption with heat carries its grids as bytes (data-heat) and their shape (data-grid); a word under the
// pointer, tapped, or chosen with the arrow keys lights up its part of the picture.
document.documentElement.classList.add("js");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const palette = bytes(document.body.dataset.palette ?? "");

function paint(canvas, grid, rows, columns) {
  const high = (canvas.height = rows * 12), wide = (canvas.width = columns * 12);
  const context = canvas.getContext("2d"), image = context.createImageData(wide, high);
  const along = (i, size, n) => {
    const at = Math.min(Math.max((i + 0.5) * n / size - 0.5, 0), n - 1), low = Math.floor(at);
    return [low, Math.min(low + 1, n - 1), at - low];
  };
  for (let y = 0; y < high; y++) {
    const [y0, y1, v] = along(y, high, rows);
    for (let x = 0; x < wide; x++) {
      const [x0, x1, u] = along(x, wide, columns);
      const above = grid[y0 * columns + x0] * (1 - u) + grid[y0 * columns + x1] * u;
      const below = grid[y1 * columns + x0] * (1 - u) + grid[y1 * columns + x1] * u;
      const heat = Math.round(above * (1 - v) + below * v), i = 4 * (y * wide + x);
      image.data.set(palette.subarray(3 * heat, 3 * heat + 3), i);
      image.data[i + 3] = 0.8 * heat;
    }
  }
  context.putImageData(image, 0, 0);
}

for (const said of document.querySelectorAll(".heated")) {
  const [rows, columns, left, top, right, bottom] = said.dataset.grid.split(" ").map(Number);
  const heat = bytes(said.dataset.heat), words = [...said.querySelectorAll("span")];
  const picture = said.closest("article").querySelector(".picture"), canvas = picture.querySelector("canvas");
  let kept = -1, now = -1;
  const show = (i) => {
    now = i;
    for (const word of picture.closest("article").querySelectorAll(".now")) word.classList.remove("now");
    picture.classList.toggle("lit", i >= 0);
    if (i < 0) return;
    words[i].classList.add("now");
    Object.assign(canvas.style, {
      left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%`,
    });
    paint(canvas, heat.subarray(i * rows * columns, (i + 1) * rows * columns), rows, columns);
  };
  words.forEach((word, i) => {
    word.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(i));
    word.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(kept));
    word.addEventListener("click", () => { kept = kept === i ? -1 : i; show(kept); });
  });
  said.tabIndex = 0;
  said.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { kept = (now + step + words.length) % words.length; show(kept); event.preventDefault(); }
    if (event.key === "Escape") show((kept = -1));
  });
  said.addEventListener("blur", () => show((kept = -1)));
}

// Searching and sorting: the form is there for those who have scripts only.
const form = document.querySelector(".controls");
if (form) {
  const main = document.querySelector("main"), cards = [...main.children];
  const [search, order, said] = ["input", "select", "output"].map((name) => form.querySelector(name));
  const texts = cards.map((card) => card.textContent.toLowerCase());
  const ranked = cards.some((card) => "rank" in card.dataset);
  order.hidden = !ranked;
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), sign = { worst: 1, best: -1 }[order.value];
    let seen = 0;
    cards.forEach((card, i) => { seen += !(card.hidden = !words.every((word) => texts[i].includes(word))); });
    const rank = (card) => ("rank" in card.dataset ? sign * card.dataset.rank : Infinity);
    main.append(...(sign ? [...cards].sort((a, b) => rank(a) - rank(b)) : cards));
    said.textContent = seen < cards.length ? `${seen} of ${cards.length}` : "";
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
}
