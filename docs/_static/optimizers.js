// One table of all optimizers, which can be filtered and sorted. Without scripts the page has its
// table for each package, from which this one is made.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const tables = [...document.querySelectorAll("table")].filter(
    (table) => table.tHead && table.tHead.rows[0].cells[0].textContent.trim() === "optimizer"
  );
  if (tables.length === 0) return;

  const columns = ["package", ...[...tables[0].tHead.rows[0].cells].map((cell) => cell.textContent.trim())];
  const rows = tables.flatMap((table) => {
    const heading = table.closest("section").querySelector("h2, h3").firstChild.textContent.trim();
    return [...table.tBodies[0].rows].map((row) => [heading, ...[...row.cells].map((cell) => cell.textContent.trim())]);
  });

  const search = document.createElement("div");
  search.className = "optimizers-search";
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter, for example: lion decoupled";
  input.setAttribute("aria-label", "Filter the optimizers");
  const count = document.createElement("span");
  count.setAttribute("role", "status");
  const all = document.createElement("button");
  all.type = "button";
  all.textContent = "show all";
  search.append(input, count, all);

  const found = document.createElement("div");
  found.className = "table-wrapper optimizers-found";
  found.hidden = true;
  const table = document.createElement("table");
  table.className = "docutils";
  const head = table.createTHead().insertRow();
  const body = table.createTBody();
  found.append(table);
  document.querySelector("article section > p").after(search, found);

  let shown = false;
  let by = 0;
  let down = false;

  const draw = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = rows.filter((row) => {
      const text = row.join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    matching.sort((one, other) => one[by].localeCompare(other[by]) * (down ? -1 : 1));
    const open = shown || words.length > 0;
    found.hidden = !open;
    count.textContent = open ? `${matching.length} of ${rows.length}` : `${rows.length} optimizers`;
    all.textContent = shown ? "hide" : "show all";
    [...head.cells].forEach((cell, i) => {
      if (i === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    body.replaceChildren();
    if (!open) return;
    for (const row of matching) {
      const line = body.insertRow();
      for (const cell of row) line.insertCell().textContent = cell;
    }
  };

  columns.forEach((column, i) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column;
    button.addEventListener("click", () => {
      down = by === i && !down;
      by = i;
      draw();
    });
    cell.append(button);
    head.append(cell);
  });
  input.addEventListener("input", draw);
  all.addEventListener("click", () => {
    shown = !shown;
    draw();
  });
  draw();
});
