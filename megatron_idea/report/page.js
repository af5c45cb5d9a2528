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

  const line = (colour, text) => {
    const row = document.createElement("div");
    if (colour) {
      const dot = document.createElement("i");
      dot.className = colour;
      row.append(dot);
    }
    row.append(text);
    return row;
  };

  const names = (figure) =>
    [...figure.querySelectorAll(".legend.runs li")].map((entry) => entry.textContent);

  // A curve's value is said where it has a point nearby; a map's at the pointer's row.
  const lines = (figure, x) => {
    const sides = { left: axis(figure.dataset.y), right: figure.dataset.right && axis(figure.dataset.right) };
    const rows = [];
    const runs = names(figure);
    for (const path of figure.querySelectorAll("path[data-name]:not(.off)")) {
      const point = nearest(path, x);
      const isPoint = path.classList.contains("points");
      if (!point || Math.abs(point[0] - x) > (isPoint ? 150 : 500)) continue;
      const a = sides[path.dataset.side || "left"];
      const value = write(a.kind, valueAt(a, 1 - point[1] / SIZE));
      const run = path.dataset.run === undefined ? "" : `${runs[path.dataset.run]}, `;
      rows.push(line(path.classList[1], `${run}${path.dataset.name}: ${value}`));
    }
    return rows;
  };

  const cells = new WeakMap();
  const cell = (frame, across, down) => {
    if (!cells.has(frame)) {
      const packed = Uint8Array.from(atob(frame.dataset.cells), (c) => c.charCodeAt(0));
      cells.set(frame, { packed, levels: frame.dataset.levels.split(" ").map(Number) });
    }
    const { packed, levels } = cells.get(frame);
    const rows = +frame.dataset.rows, columns = packed.length / rows;
    const row = Math.min(rows - 1, Math.floor(down * rows));
    const value = levels[packed[row * columns + Math.min(columns - 1, Math.floor(across * columns))]];
    const text = value === undefined ? frame.dataset.gap || "-" : write(frame.dataset.kind, value);
    return [line("", `layer ${row}, ${frame.dataset.unit}: ${text}`)];
  };

  const phase = (figure, share) => {
    for (const name of figure.querySelectorAll(".phase")) {
      const left = parseFloat(name.style.left), right = left + parseFloat(name.style.width);
      if (100 * share >= left && 100 * share <= right) return `, ${name.textContent}`;
    }
    return "";
  };

  const clear = () => {
    tip.remove();
    document.querySelectorAll(".cursor").forEach((cursor) => cursor.remove());
  };

  const show = (plot, event) => {
    clear();
    const figure = plot.closest(".chart"), frame = plot.closest(".frame");
    const box = plot.getBoundingClientRect();
    const within = (value) => Math.min(1, Math.max(0, value));
    const share = within((event.clientX - box.left) / box.width);
    for (const other of document.querySelectorAll(".chart")) {
      if (other.dataset.x !== figure.dataset.x) continue;
      const cursor = document.createElement("div");
      cursor.className = "cursor";
      cursor.style.left = `${100 * share}%`;
      other.querySelector(".plot").append(cursor);
    }
    const rows = frame.dataset.cells
      ? cell(frame, share, within((event.clientY - box.top) / box.height))
      : lines(figure, share * SIZE);
    const across = figure.querySelector(".label.x").textContent;
    const head = `${write("count", valueAt(axis(figure.dataset.x), share))} ${across}${phase(figure, share)}`;
    tip.replaceChildren(line("", head), ...rows);
    plot.append(tip);
    // Beside the pointer where there is room, and never outside of the plot.
    const free = box.width - tip.offsetWidth;
    const left = share < 0.5 ? share * box.width + 10 : share * box.width - tip.offsetWidth - 10;
    tip.style.left = `${Math.max(0, Math.min(free, left))}px`;
  };

  for (const plot of document.querySelectorAll(".plot")) {
    plot.addEventListener("pointermove", (event) => show(plot, event));
    plot.addEventListener("pointerdown", (event) => show(plot, event));
    // A finger that lets go leaves the values there to be read.
    plot.addEventListener("pointerleave", (event) => event.pointerType === "touch" || clear());
  }
  document.addEventListener("pointerdown", (event) => event.target.closest(".plot") || clear());

  // Runs of a comparison: hidden, or shown alone, in every chart at once.
  const all = (run) => document.querySelectorAll(`path[data-run="${run}"], .runs [data-run="${run}"]`);
  for (const entry of document.querySelectorAll(".runs [data-run]")) {
    const run = entry.dataset.run;
    const hide = () => all(run).forEach((part) => part.classList.toggle("off"));
    const light = (is) => {
      document.documentElement.classList.toggle("one", is);
      all(run).forEach((part) => part.classList.toggle("lit", is));
    };
    entry.addEventListener("click", hide);
    entry.addEventListener("keydown", (event) => event.key === "Enter" && hide());
    entry.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && light(true));
    entry.addEventListener("pointerleave", () => light(false));
  }
})();
