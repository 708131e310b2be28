"use strict";
// Read-outs: moving over one chart reads all of them at the same step. Arrow keys, Home and End do the same.
const plots = [...document.querySelectorAll(".plot")].map((node) => {
  const [steps, texts] = JSON.parse(node.dataset.chart);
  const figure = node.closest("figure");
  return {
    node, steps, texts,
    first: Number(node.dataset.first), last: Number(node.dataset.last),
    canvas: node.querySelector(".canvas"), cursor: node.querySelector(".cursor"),
    readout: figure.querySelector(".readout"), resting: texts.length ? texts[texts.length - 1] : "",
  };
}).filter((plot) => plot.steps.length);

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] <= steps[low] - wanted ? low - 1 : low;
}

function read(step) {
  for (const plot of plots) {
    const index = nearest(plot.steps, step);
    const x = (100 * (plot.steps[index] - plot.first)) / (plot.last - plot.first) + "%";
    const near = Math.abs(plot.steps[index] - step) <= (plot.last - plot.first) / 50 + 1;
    plot.cursor.setAttribute("x1", x);
    plot.cursor.setAttribute("x2", x);
    plot.cursor.classList.toggle("on", near);
    plot.readout.textContent = near ? plot.texts[index] : `step ${step}: no figure`;
    plot.node.setAttribute("aria-valuenow", plot.steps[index]);
    plot.node.setAttribute("aria-valuetext", plot.texts[index]);
  }
}

function rest() {
  for (const plot of plots) {
    plot.cursor.classList.remove("on");
    plot.readout.textContent = plot.resting;
  }
}

for (const plot of plots) {
  const { node, steps } = plot;
  let at = steps.length - 1;
  node.tabIndex = 0;
  node.setAttribute("role", "slider");
  node.setAttribute("aria-valuemin", steps[0]);
  node.setAttribute("aria-valuemax", steps[steps.length - 1]);
  node.setAttribute("aria-valuenow", steps[at]);
  node.setAttribute("aria-valuetext", plot.resting);
  node.addEventListener("pointermove", (event) => {
    const box = plot.canvas.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    at = nearest(steps, plot.first + share * (plot.last - plot.first));
    read(steps[at]);
  });
  node.addEventListener("pointerleave", rest);
  node.addEventListener("focus", () => { if (node.matches(":focus-visible")) read(steps[at]); });
  node.addEventListener("blur", rest);
  node.addEventListener("keydown", (event) => {
    const big = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -big, PageUp: big,
      Home: -steps.length, End: steps.length };
    if (!(event.key in moves)) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + moves[event.key]));
    read(steps[at]);
  });
}

// Samples: search, order, pages. Without this script all of them are shown, one after another.
for (const browser of document.querySelectorAll(".browser")) {
  const list = browser.querySelector(".items");
  const items = [...list.children];
  const size = Number(browser.dataset.page);
  const search = browser.querySelector("[type=search]");
  const order = browser.querySelector("select");
  const [back, forward] = browser.querySelectorAll(".turn button");
  const count = browser.querySelector(".count");
  const haystacks = items.map((item) => item.textContent.toLowerCase());
  let page = 0;
  browser.querySelector(".controls").hidden = false;

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = items.filter((item, i) => words.every((word) => haystacks[i].includes(word)));
    if (order && order.value !== "file") {
      const [key, sign] = order.value.split(" ");
      // A row without that figure goes last, whichever way the order runs.
      const value = (item) => (item.dataset[key] === "" ? Infinity : Number(sign) * Number(item.dataset[key]));
      found = found.map((item) => [value(item), item]).sort((a, b) => (a[0] === b[0] ? 0 : a[0] - b[0])).map((pair) => pair[1]);
    }
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.min(page, pages - 1);
    const shown = found.slice(page * size, page * size + size);
    items.forEach((item) => { item.hidden = true; });
    shown.forEach((item) => { item.hidden = false; list.append(item); });
    const start = found.length ? page * size + 1 : 0;
    count.textContent = found.length ? `${start}–${start + shown.length - 1} of ${found.length}` : "nothing found";
    back.disabled = page === 0;
    forward.disabled = page >= pages - 1;
  }

  search.addEventListener("input", () => { page = 0; show(); });
  if (order) order.addEventListener("change", () => { page = 0; show(); });
  back.addEventListener("click", () => { page -= 1; show(); });
  forward.addEventListener("click", () => { page += 1; show(); });
  show();
}

// A link into a fold-out opens it.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", unfold);
unfold();

// A fold-out prints only when it is open.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.print").forEach((node) => { node.open = true; });
});
