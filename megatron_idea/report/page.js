// Values at the pointer, its line through every chart over the same tokens, and zoom in all of them.
"use strict";
(() => {
  const SIZE = 10000;

  const axis = (text) => {
    const [low, high, scale, kind] = text.split(" ");
    return { low: +low, high: +high, isLog: scale === "log", kind };
  };

  const valueAt = (a, share) =>
    a.isLog ? a.low * (a.high / a.low) ** share : a.low + share * (a.high - a.low);

  const write = (kind, value, digits = 4) => {
    if (kind === "scientific") return value.toExponential(2);
    if (kind === "whole") return Math.round(value).toLocaleString("en");
    if (kind === "count")
      for (const [size, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
        if (Math.abs(value) >= size) return +(value / size).toPrecision(digits) + suffix;
    return String(+value.toPrecision(digits));
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

  const within = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));

  // What is seen of an x axis, the same in all charts over it: begin and end as shares of it.
  const views = new Map();
  const view = (figure) => views.get(figure.dataset.x) || [0, 1];
  const over = (x) => [...document.querySelectorAll(".chart")].filter((chart) => chart.dataset.x === x);

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
  const lines = (figure, x, wide) => {
    const sides = { left: axis(figure.dataset.y), right: figure.dataset.right && axis(figure.dataset.right) };
    const rows = [];
    const runs = names(figure);
    for (const path of figure.querySelectorAll("path[data-name]:not(.off)")) {
      const point = nearest(path, x);
      const isPoint = path.classList.contains("points");
      // Far into a zoom there may be no point in sight.
      const near = isPoint ? Math.max(10, 150 * wide) : Math.max(30, 500 * wide);
      if (!point || Math.abs(point[0] - x) > near) continue;
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
    const share = within((event.clientX - box.left) / box.width);
    const [begin, end] = view(figure), wide = end - begin, whole = begin + share * wide;
    for (const other of over(figure.dataset.x)) {
      const cursor = document.createElement("div");
      cursor.className = "cursor";
      cursor.style.left = `${100 * share}%`;
      other.querySelector(".plot").append(cursor);
    }
    const rows = frame.dataset.cells
      ? cell(frame, whole, within((event.clientY - box.top) / box.height))
      : lines(figure, whole * SIZE, wide);
    const across = figure.querySelector(".label.x").textContent;
    const at = write("count", valueAt(axis(figure.dataset.x), whole), wide < 1 ? 6 : 4);
    const head = `${at} ${across}${phase(figure, share)}`;
    tip.replaceChildren(line("", head), ...rows);
    plot.append(tip);
    // Beside the pointer where there is room, and never outside of the plot.
    const free = box.width - tip.offsetWidth;
    const left = share < 0.5 ? share * box.width + 10 : share * box.width - tip.offsetWidth - 10;
    tip.style.left = `${Math.max(0, Math.min(free, left))}px`;
  };

  const labels = (a, low, high) => {
    const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((times) => times * unit >= rough);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) {
      const label = document.createElement("span"), place = (k * step - low) / (high - low);
      label.className = place > 0.97 ? "last" : k % 2 ? "odd" : "";
      label.style.left = `${100 * place}%`;
      label.append(write(a.kind, k * step, 8));
      found.push(label);
    }
    return found;
  };

  // Draw one chart as its view says; how it came is kept beside it.
  const redraw = (figure) => {
    const [begin, end] = view(figure), wide = end - begin, zoomed = wide < 1;
    const place = (share) => within((share - begin) / wide) * 100;
    const a = axis(figure.dataset.x), ticks = figure.querySelector(".ticks.x");
    const image = figure.querySelector(".plot img");
    figure.classList.toggle("zoomed", zoomed);
    figure.querySelector(".plot svg")?.setAttribute("viewBox", `${begin * SIZE} 0 ${wide * SIZE} ${SIZE}`);
    if (image) image.style.cssText = zoomed ? `left:${(-100 * begin) / wide}%;width:${100 / wide}%` : "";
    for (const { dataset, style } of figure.querySelectorAll(".phase")) {
      style.cssText = dataset.whole ||= style.cssText;
      const left = parseFloat(style.left) / 100, right = left + parseFloat(style.width) / 100;
      if (zoomed) style.cssText = `left:${place(left)}%;width:${place(right) - place(left)}%`;
    }
    ticks.whole ||= [...ticks.children];
    ticks.replaceChildren(...(zoomed ? labels(a, valueAt(a, begin), valueAt(a, end)) : ticks.whole));
    const button = figure.querySelector(".whole") || document.createElement("button");
    if (!zoomed) return button.remove();
    button.className = "whole";
    button.textContent = "whole range";
    button.onclick = () => {
      zoom(figure, 0, 1);
      figure.tabIndex = -1;
      figure.focus({ preventScroll: true });
    };
    figure.querySelector("figcaption").prepend(button);
  };

  // Curves are whole numbers of 10,000: closer than a two hundredth there is nothing more to see.
  const zoom = (figure, begin, end) => {
    const middle = within((begin + end) / 2, 0.0025, 0.9975), half = Math.max(0.0025, (end - begin) / 2);
    views.set(figure.dataset.x, [within(middle - half), within(middle + half)]);
    clear();
    over(figure.dataset.x).forEach(redraw);
  };

  // With a mouse alone: a finger's drag scrolls the page.
  let drag = null;
  const range = document.createElement("div");
  range.className = "range";
  const drop = () => {
    drag = null;
    range.remove();
  };
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const box = drag.plot.getBoundingClientRect(), now = within((event.clientX - box.left) / box.width);
    drag.ends = [Math.min(drag.from, now), Math.max(drag.from, now)];
    const [left, right] = drag.ends;
    drag.far = (right - left) * box.width >= 8;  // less is a click of an unsteady hand
    range.style.cssText = `left:${100 * left}%;width:${100 * (right - left)}%`;
    if (drag.far) drag.plot.append(range);
    else range.remove();
  });
  document.addEventListener("pointerup", () => {
    if (drag?.far) {
      const [begin, end] = view(drag.figure), [left, right] = drag.ends;
      zoom(drag.figure, begin + left * (end - begin), begin + right * (end - begin));
    }
    drop();
  });
  document.addEventListener("pointercancel", drop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && drop());

  for (const plot of document.querySelectorAll(".plot")) {
    const figure = plot.closest(".chart");
    if (!axis(figure.dataset.x).isLog) {
      plot.classList.add("zooms");
      plot.addEventListener("pointerdown", (event) => {
        if (event.pointerType !== "mouse" || event.button) return;
        const box = plot.getBoundingClientRect();
        drag = { plot, figure, from: within((event.clientX - box.left) / box.width) };
      });
      plot.addEventListener("dragstart", (event) => event.preventDefault());
      plot.addEventListener("dblclick", () => zoom(figure, 0, 1));
    }
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
