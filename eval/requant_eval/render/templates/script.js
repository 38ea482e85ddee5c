"use strict";
// Tables of numbers: a button in every column head sorts up, down, and back to the order of the page.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  if (rows.length < 2 || !body.querySelector("td:not(.w)")) continue;
  const key = (row, column) => {
    const cell = row.cells[column], text = cell.textContent.trim();
    if (cell.tagName === "TH" || cell.classList.contains("w")) return text;
    const number = Number(cell.dataset.k ?? (text || NaN));
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = {none: "ascending", ascending: "descending", descending: "none"}[head.ariaSort || "none"];
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next !== "none") head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const sorted = next === "none" ? rows : [...rows].sort((a, b) => {
        const x = key(a, column), y = key(b, column);
        return x === null || y === null ? (x === null) - (y === null) : sign * compare(x, y);
      });
      body.append(...sorted);
    });
  });
}

// Strips of many bars are drawn as a few paths; every bar gets a mark of its own here.
const draw = (name, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
for (const strip of document.querySelectorAll("svg[data-v]")) {
  const places = Number(strip.dataset.n), height = strip.getAttribute("height");
  for (const pair of strip.dataset.v.trim().split(" ")) {
    const [at, value] = pair.split(":"), mark = draw("g", {class: "m hit"}), title = draw("title", {});
    title.textContent = `layer ${at}: ${value}`;
    mark.append(title, draw("rect", {x: `${100 * at / places}%`, width: `${88 / places}%`, height}));
    strip.append(mark);
  }
}

// Figures: the value of the mark under the pointer, or of the one that the arrow keys have reached, below the figure.
for (const chart of document.querySelectorAll(".chart")) {
  const marks = [...chart.querySelectorAll(".m")], read = document.createElement("p");
  if (!marks.length) continue;
  const hint = chart === document.querySelector(".chart") ? "Point at a mark, or use the arrow keys in a figure, to read values." : "";
  read.className = "read";
  read.setAttribute("aria-live", "polite");
  chart.after(read);
  chart.tabIndex = 0;
  let at = -1;
  const rowOf = (mark) => mark.closest(".row");
  const name = (mark) => {
    const said = mark.querySelector("title").dataset.t, row = rowOf(mark).querySelector("svg");
    return row.hasAttribute("aria-label") ? rowOf(mark).querySelector(".label").textContent.trim() + ", " + said : said;
  };
  const show = (index) => {
    if (marks[at]) marks[at].classList.remove("on");
    at = index;
    read.classList.toggle("on", at >= 0);
    read.textContent = at < 0 ? hint : name(marks[at]);
    if (at >= 0) marks[at].classList.add("on");
  };
  const beside = (step) => {
    const rows = [...new Set(marks.map(rowOf))], row = rows.indexOf(rowOf(marks[at])) + step;
    if (row < 0 || row >= rows.length) return at;
    const here = marks.filter((m) => rowOf(m) === rowOf(marks[at])).indexOf(marks[at]);
    const there = marks.filter((m) => rowOf(m) === rows[row]);
    return marks.indexOf(there[Math.min(here, there.length - 1)]);
  };
  marks.forEach((mark, index) => {
    // The readout takes the place of the browser's own, late and mouse-only, tooltip.
    const title = mark.querySelector("title");
    title.dataset.t = title.textContent;
    title.textContent = "";
    mark.addEventListener("pointerenter", () => show(index));
  });
  chart.addEventListener("pointerleave", () => show(-1));
  chart.addEventListener("focus", () => { if (at < 0 && chart.matches(":focus-visible")) show(0); });
  chart.addEventListener("blur", () => show(-1));
  chart.addEventListener("keydown", (event) => {
    const moves = {
      ArrowRight: () => Math.min(at + 1, marks.length - 1), ArrowLeft: () => Math.max(at - 1, 0),
      ArrowDown: () => beside(1), ArrowUp: () => beside(-1),
      Home: () => 0, End: () => marks.length - 1, Escape: () => -1,
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(at < 0 && event.key !== "Escape" ? 0 : moves[event.key]());
  });
  show(-1);
}

// What scrolls sideways must be reachable with the keyboard; what is folded must be on paper.
const reach = () => {
  for (const box of document.querySelectorAll(".table")) {
    const wide = box.scrollWidth > box.clientWidth + 1;
    box.toggleAttribute("tabindex", wide);
    if (wide) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", (box.querySelector("caption") ?? box.closest("section").querySelector("h2")).textContent);
    } else {
      for (const name of ["role", "aria-label"]) box.removeAttribute(name);
    }
  }
};
reach();
addEventListener("resize", reach);
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
