"use strict";
// Turns column headers into buttons that sort the table by their column, and in reverse order when used again.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  const value = (row, column) => row.cells[column].textContent.trim();
  const number = (text) => {
    const found = text.replace("−", "-").match(/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
    return found ? parseFloat(found[0]) : NaN;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows];
      const numeric = rows.every((row) => value(row, column) === "" || !isNaN(number(value(row, column))));
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // empty cells come last
        const order = numeric ? number(x) - number(y) : x.localeCompare(y, undefined, { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
