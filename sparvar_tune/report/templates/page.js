"use strict";
// A slider moves the edge between two pictures; it is an ordinary range input, so keys and screen readers know it.
for (const stage of document.querySelectorAll(".stage")) {
  const input = stage.querySelector("input");
  const move = () => {
    stage.style.setProperty("--at", input.value + "%");
    input.setAttribute("aria-valuetext", input.value + " % dense, the rest tuned");
  };
  input.addEventListener("input", move);
  move();
}
// The calculator: report/cost.py's formulas over the measured times in data-* and the load that is typed in.
const bill = document.querySelector("[data-dense-s]");
if (bill) {
  const big = (x) => {
    const digits = Math.abs(x) >= 100 ? 0 : 2;
    return x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };
  const [dense, speedup, low, high] = ["denseS", "speedup", "low", "high"].map((name) => Number(bill.dataset[name]));
  const put = (name, text) => {
    const cell = bill.querySelector('[data-cell="' + name + '"]');
    if (cell) cell.textContent = text;
  };
  const sums = () => {
    const images = Number(bill.querySelector("[name=images]").value);
    const price = Number(bill.querySelector("[name=price]").value);
    const good = images > 0 && price >= 0 && Number.isFinite(images * price);
    const year = images * Number(bill.dataset.days) / 3600;
    const saved = [speedup, low, high].map((s) => year * dense * (1 - 1 / s));
    for (const [row, factor] of [["hours", 1], ["money", price]]) {
      const [middle, least, most] = saved.map((hours) => big(hours * factor));
      put(row + "-1", good ? big(year * dense * factor) : "?");
      put(row + "-2", good ? big((year * dense - saved[0]) * factor) : "?");
      put(row + "-3", good ? middle + " (" + least + " to " + most + ")" : "?");
    }
  };
  for (const input of bill.querySelectorAll("input")) input.addEventListener("input", sums);
}
