// Values at the pointer, and its line through every chart over the same tokens.
"use strict";
(() => {
  const SIZE = 10000;

  const axis = (text) => {
    const [low, high, scale, kind] = text.split(" ");
    return { low: +low, high: +high, isLog: scale === "log", kind };
  };

  const valueAt = (a, share) =>
    a.isLog ? a.low * (a.high / a.low) ** share : a.low + share * (a.high - a.low);

  const write = (kind, value) => {
    if (kind === "scientific") return value.toExponential(2);
    if (kind === "whole") return Math.round(value).toLocaleString("en");
    if (kind === "count")
      for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
        if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + suffix;
    return String(+value.toPrecision(4));
  };

  // The nearest point of a path to x, as [x, y] in the SVG's coordinates.
  const points = new WeakMap();
  const nearest = (path, x) => {
    if (!points.has(path)) {
      const found = [];
      let at = [0, 0];
      for (const [, command, rest] of path.getAttribute("d").matchAll(/([MLHV])([-\d ]+)/g)) {
        const [a, b] = rest.trim().split(" ").map(Number);
        at = command === "H" ? [a, at[1]] : command === "V" ? [at[0], a] : [a, b];
        if (command === "V") found.pop();
        found.push(at);
      }
      points.set(path, found);
    }
    let best = null;
    for (const point of points.get(path))
      if (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
    return best;
  };

  const tip = document.createElement("div");
  tip.className = "tip";

  const lines = (figure, x) => {
    const sides = { left: axis(figure.dataset.y), right: figure.dataset.right && axis(figure.dataset.right) };
    const rows = [];
    for (const path of figure.querySelectorAll("path[data-name]")) {
      const point = nearest(path, x);
      const isPoint = path.classList.contains("points");
      if (!point || Math.abs(point[0] - x) > (isPoint ? 150 : 500)) continue;
      const a = sides[path.dataset.side || "left"];
      const row = document.createElement("div");
      const dot = document.createElement("i");
      dot.className = path.classList[1];
      row.append(dot, `${path.dataset.name}: ${write(a.kind, valueAt(a, 1 - point[1] / SIZE))}`);
      rows.push(row);
    }
    return rows;
  };

  const clear = () => {
    tip.remove();
    document.querySelectorAll(".cursor").forEach((cursor) => cursor.remove());
  };

  const show = (plot, event) => {
    clear();
    const figure = plot.closest(".chart");
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    for (const other of document.querySelectorAll(".chart")) {
      if (other.dataset.x !== figure.dataset.x) continue;
      const cursor = document.createElement("div");
      cursor.className = "cursor";
      cursor.style.left = `${100 * share}%`;
      other.querySelector(".plot").append(cursor);
    }
    if (!figure.dataset.y) return;
    const head = document.createElement("div");
    head.textContent = `${write("count", valueAt(axis(figure.dataset.x), share))} tokens`;
    tip.replaceChildren(head, ...lines(figure, share * SIZE));
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 10px)`;
    plot.append(tip);
  };

  for (const plot of document.querySelectorAll(".plot")) {
    plot.addEventListener("pointermove", (event) => show(plot, event));
    plot.addEventListener("pointerdown", (event) => show(plot, event));
    plot.addEventListener("pointerleave", clear);
  }
})();
