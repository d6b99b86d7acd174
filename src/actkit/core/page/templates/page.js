"use strict";
// What a page of a result can do: tables are sorted by their headings and filtered by a word, rows open their
// contexts, and what is pointed at in a picture, or reached by arrow keys, is read out. Texts of a model are set as
// text, never as markup.

for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody"), shown = box.querySelector(".shown"), given = box.querySelector("script");
  const rows = [...body.rows], contexts = given ? JSON.parse(given.textContent) : null;
  const words = rows.map((row, index) =>
    (row.textContent + (contexts ? " " + contexts[index].map(([tokens]) => tokens.join("")).join(" ") : "")).toLowerCase());
  const opened = new Map();

  const value = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  const place = (order) => {
    for (const row of order) {
      body.append(row);
      if (opened.has(row)) body.append(opened.get(row));
    }
  };

  box.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.parentElement, down = heading.ariaSort !== "descending";
      box.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
      heading.ariaSort = down ? "descending" : "ascending";
      const sign = down ? -1 : 1;
      rows.sort((a, b) => {
        const one = value(a, column), other = value(b, column);
        if (typeof one === "number" && typeof other === "number") {
          if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
          return sign * (one - other);
        }
        return sign * String(one).localeCompare(String(other), "en", {numeric: true});
      });
      place(rows);
    });
  });

  const first = new Map(rows.map((row, index) => [row, index]));
  box.querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !words[first.get(row)].includes(wanted);
      if (opened.has(row)) opened.get(row).hidden = row.hidden;
      count += !row.hidden;
    }
    shown.textContent = wanted ? `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`
                               : `${rows.length.toLocaleString("en")} rows`;
  });

  if (!contexts) continue;
  rows.forEach((row, index) => {
    if (!contexts[index].length) return;
    const cell = row.cells[0], button = document.createElement("button");
    button.type = "button";
    button.className = "opens";
    button.append(...cell.childNodes);
    button.ariaExpanded = "false";
    cell.append(button);
    button.addEventListener("click", () => {
      if (opened.has(row)) {
        opened.get(row).remove();
        opened.delete(row);
        button.ariaExpanded = "false";
        return;
      }
      const detail = document.createElement("tr"), wide = detail.insertCell();
      wide.colSpan = row.cells.length;
      for (const [tokens, shades] of contexts[index]) {
        const line = document.createElement("p");
        line.className = "context";
        tokens.forEach((token, at) => {
          const span = document.createElement("span");
          span.textContent = token;
          if (shades[at] !== "0") span.style.setProperty("--shade", Number(shades[at]) / 9);
          line.append(span);
        });
        wide.append(line);
      }
      row.after(detail);
      opened.set(row, detail);
      button.ariaExpanded = "true";
    });
  });
}

// A point or cell is read out below its pictures. One that stands for a row of a table carries its name in `data-of`: it
// is marked in all pictures and in the table, and Enter or a click opens what the page says of it.
for (const section of document.querySelectorAll("section")) {
  const pointed = section.querySelector(".pointed");
  if (!pointed) continue;
  let last = null;
  const same = (cell) => (cell.dataset.of ? [...document.querySelectorAll(`[data-of="${cell.dataset.of}"]`)] : [cell]);
  const point = (cell) => {
    if (last) same(last).forEach((each) => each.classList.remove("at"));
    last = cell;
    same(cell).forEach((each) => each.classList.add("at"));
    pointed.textContent = cell.querySelector("title").textContent;
  };
  const open = (cell) => {
    const detail = cell && cell.dataset.of && document.getElementById(cell.dataset.of);
    if (!detail) return;
    for (let each = detail; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    detail.scrollIntoView();
  };
  for (const picture of section.querySelectorAll("svg")) {
    const cells = [...picture.querySelectorAll("g")].filter((each) => each.querySelector("title"));
    if (!cells.length) continue;
    const middle = (cell) => {
      const box = cell.querySelector("rect, circle, polygon").getBBox();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };
    const under = (event) => cells.find((each) => each === event.target.closest("g"));
    picture.addEventListener("pointerover", (event) => under(event) && point(under(event)));
    picture.addEventListener("click", (event) => open(under(event)));
    picture.parentElement.addEventListener("keydown", (event) => {
      if (event.key === "Enter") return open(last);
      const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      if (!step) return;
      event.preventDefault();
      if (!cells.includes(last)) return point(cells[0]);
      const [x, y] = middle(last), ahead = [];
      for (const cell of cells) {
        const [a, b] = middle(cell), along = (a - x) * step[0] + (b - y) * step[1];
        const aside = Math.abs((a - x) * step[1]) + Math.abs((b - y) * step[0]);
        if (along > 0.1) ahead.push([along + 4 * aside, cell]);  // so that rows and columns of a grid are kept
      }
      if (ahead.length) point(ahead.reduce((one, other) => (other[0] < one[0] ? other : one))[1]);
    });
  }
}
