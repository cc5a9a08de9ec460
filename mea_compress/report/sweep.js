"use strict";
// Draws the page of a sweep from its JSON: inline SVG, no library, no network.

const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const tip = document.getElementById("tip");
const made = data.points.filter((point) => point.reason === null);
const whole = data.reference.kv_bytes_per_token;

// ---- Small things ----------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick" || key === "oninput") node[key] = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(digits)));
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${Number(value.toPrecision(value >= 100 ? 4 : 3))}\u00a0${units[unit]}`;
}

const percent = (value, digits = 3) => (value === null ? "–" : `${number(100 * value, digits)}\u00a0%`);
const seriesOf = (point) => [point.method, point.budget].filter(Boolean).join(", ");
const methodsOf = (point) =>
  point.key_composition === point.value_composition
    ? point.key_composition || "–"
    : `${point.key_composition || "as they are"} + ${point.value_composition || "as they are"}`;

/** A section with a heading, a sentence, and a function that draws into it whenever width or theme change. */
const drawings = [];
function section(title, sentence, ...children) {
  const node = element("section", {}, element("h2", {}, title), sentence ? element("p", {}, sentence) : null, ...children);
  page.append(node);
  return node;
}
function drawn(draw) {
  drawings.push(draw);
  draw();
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The colour of a share between 0 and 1, and that of text on it. */
function shade(share) {
  const [low, high] = ["--low", "--high"].map((name) => style(name).split(" ").map(Number));
  const rgb = low.map((from, index) => Math.round(from + Math.min(1, Math.max(0, share)) * (high[index] - from)));
  const light = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2] > 140;
  return { fill: `rgb(${rgb.join(" ")})`, text: light ? "#11161c" : "#ffffff" };
}

// ---- What is under the pointer ---------------------------------------------------------------------------------------

function showTip(target, x, y) {
  tip.textContent = target.getAttribute("data-tip");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + box.height + 24 > innerHeight ? Math.max(8, y - box.height - 12) : y + 16}px`;
}
document.addEventListener("pointermove", (event) => {
  const target = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (target) showTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("pointerdown", (event) => {
  const target = event.target.closest ? event.target.closest("[data-tip]") : null;
  if (target) showTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  if (!event.target.hasAttribute || !event.target.hasAttribute("data-tip")) return;
  const box = event.target.getBoundingClientRect();
  showTip(event.target, box.right, box.bottom);
});
document.addEventListener("focusout", () => { tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// ---- Axes ------------------------------------------------------------------------------------------------------------

/** Values to mark between two ends: round numbers, or those of every decade on a logarithmic axis. */
function marks(low, high, logarithmic, wanted) {
  if (!logarithmic) {
    const rough = (high - low) / wanted || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((size) => size >= rough);
    const values = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index += 1) {
      values.push(Number((index * step).toPrecision(12)));
    }
    return values;
  }
  for (const times of [[1, 2, 5], [1, 3], [1]]) {
    const values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of times) {
        const value = factor * 10 ** power;
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) values.push(value);
      }
    }
    if (values.length <= wanted + 2 || times.length === 1) {
      const every = Math.ceil(values.length / (wanted + 2));
      return values.filter((_, index) => index % every === 0);
    }
  }
  return [];
}

function scale(low, high, from, to, logarithmic) {
  const forward = logarithmic ? Math.log : (value) => value;
  const [first, last] = [forward(low), forward(high)];
  return (value) => from + ((forward(value) - first) / (last - first || 1)) * (to - from);
}

/** An empty chart with its axes; returns the SVG and where values lie. */
function axes(width, height, x, y) {
  const left = 60, right = width - 14, top = 12, bottom = height - 46;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${y.label} against ${x.label}` });
  const across = scale(x.low, x.high, left, right, x.logarithmic);
  const up = scale(y.low, y.high, bottom, top, y.logarithmic);
  for (const value of marks(x.low, x.high, x.logarithmic, Math.max(2, Math.floor(width / 110)))) {
    chart.append(svg("line", { class: "grid", x1: across(value), x2: across(value), y1: top, y2: bottom }));
    chart.append(svg("text", { x: across(value), y: bottom + 17, "text-anchor": "middle" }, x.show(value)));
  }
  for (const value of marks(y.low, y.high, y.logarithmic, Math.max(3, Math.floor(height / 60)))) {
    chart.append(svg("line", { class: "grid", x1: left, x2: right, y1: up(value), y2: up(value) }));
    chart.append(svg("text", { x: left - 8, y: up(value) + 4, "text-anchor": "end" }, y.show(value)));
  }
  chart.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  chart.append(svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom }));
  chart.append(svg("text", { class: "title", x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, x.label));
  const middle = (top + bottom) / 2;
  chart.append(
    svg("text", { class: "title", x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, y.label),
  );
  return { chart, across, up, left, right, top, bottom };
}

/** Ends of an axis around values, with some room. */
function ends(values, logarithmic) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (logarithmic) return [low / 1.35, high * 1.35];
  const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - room, high + room];
}

const SHAPES = [
  (x, y) => `M${x - 5.5} ${y}a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z`,
  (x, y) => `M${x - 5} ${y - 5}h10v10h-10z`,
  (x, y) => `M${x} ${y - 6.5}l6.5 6.5l-6.5 6.5l-6.5 -6.5z`,
  (x, y) => `M${x} ${y - 6}l6 11h-12z`,
  (x, y) => `M${x} ${y + 6}l-6 -11h12z`,
];
const colour = (index) => `var(--c${index % 8})`;
const shape = (index, x, y) => SHAPES[index % SHAPES.length](x, y);

// ---- Header ----------------------------------------------------------------------------------------------------------

function header() {
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const button = element("button", { id: "theme", type: "button" });
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.onclick = () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    label();
    drawings.forEach((draw) => draw());
  };
  label();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { label(); drawings.forEach((draw) => draw()); });
  const front = made.filter((point) => point.pareto).length;
  const sentence =
    `The original caches ${bytes(whole)} a token and has perplexity ${number(data.reference.perplexity, 4)} on ` +
    `${data.tokens.toLocaleString("en")} tokens of ${data.text.join(", ")}. ` +
    `${made.length} of ${data.points.length} ways to compress it were made and measured; ${front} of them no other beats.`;
  page.append(
    element("header", {}, element("div", {}, element("h1", {}, `${data.source}: loss against cache`), element("p", {}, sentence)), button),
  );
}

// ---- Loss against cache ----------------------------------------------------------------------------------------------

function tradeoff() {
  const measures = [
    { key: "kl", name: "KL", label: "KL from the original (nats/token)", positive: true, better: Math.min },
    { key: "perplexity", name: "Perplexity", label: "perplexity", original: data.reference.perplexity, better: Math.min },
    { key: "cross_entropy", name: "Cross-entropy", label: "cross-entropy (nats/token)", original: data.reference.cross_entropy, better: Math.min },
    { key: "top1_agreement", name: "Top-1", label: "top-1 agreement", percent: true, better: Math.max },
  ];
  const names = [...new Set(made.map(seriesOf))];
  const hidden = new Set();
  let measure = measures[0];
  const plot = element("div", { class: "plot" });
  const buttons = measures.map((one) =>
    element("button", { type: "button", "aria-pressed": one === measure, onclick: () => { measure = one; press(); draw(); } }, one.name),
  );
  const press = () => buttons.forEach((button, index) => button.setAttribute("aria-pressed", measures[index] === measure));
  const legend = element("div", { class: "legend" });
  names.forEach((name, index) => {
    const sample = svg("svg", { width: 16, height: 16, "aria-hidden": "true" }, svg("path", { d: shape(index, 8, 8), fill: colour(index) }));
    const button = element("button", { type: "button", "aria-pressed": true }, sample, name);
    button.onclick = () => {
      if (hidden.has(name)) hidden.delete(name);
      else if (hidden.size + 1 < names.length) hidden.add(name);
      button.setAttribute("aria-pressed", !hidden.has(name));
      draw();
    };
    legend.append(button);
  });
  const draw = () => {
    const shown = made.filter((point) => !hidden.has(seriesOf(point)));
    const values = shown.map((point) => point[measure.key]);
    const logarithmic = Boolean(measure.positive) && values.every((value) => value > 0);
    const [low, high] = ends(measure.original ? [...values, measure.original] : values, logarithmic);
    const [first, last] = ends(shown.map((point) => point.kv_bytes_per_token / whole), false);
    const width = Math.max(280, plot.clientWidth);
    const height = Math.round(Math.min(430, Math.max(300, 0.62 * width)));
    const { chart, across, up, left, right, top } = axes(width, height,
      { low: first, high: last, label: "cache kept", show: (value) => percent(value) },
      { low, high, logarithmic, label: measure.label, show: (value) => (measure.percent ? percent(value) : number(value, 2 + !logarithmic)) });
    if (measure.original) {
      const y = up(measure.original);
      chart.append(svg("line", { x1: left, x2: right, y1: y, y2: y, stroke: "var(--muted)", "stroke-dasharray": "2 4" }));
      chart.append(svg("text", { x: right - 4, y: y - 6, "text-anchor": "end" }, "original"));
    }
    // The front of what is shown: each has the best value of all with no larger a cache.
    const front = [];
    for (const point of [...shown].sort((a, b) => a.kv_bytes_per_token - b.kv_bytes_per_token || a.kl - b.kl)) {
      const best = front.length ? front[front.length - 1][measure.key] : null;
      if (best === null || (measure.better(point[measure.key], best) !== best)) front.push(point);
    }
    const place = (point) => [across(point.kv_bytes_per_token / whole), up(point[measure.key])];
    if (front.length > 1) {
      const steps = front.map((point, index) => {
        const [x, y] = place(point);
        return index ? `H${x}V${y}` : `M${x} ${y}`;
      });
      chart.append(svg("path", { d: steps.join(""), fill: "none", stroke: "var(--muted)", "stroke-width": 1.5, "stroke-dasharray": "6 4" }));
    }
    names.forEach((name, index) => {
      const line = shown.filter((point) => seriesOf(point) === name).sort((a, b) => a.kv_bytes_per_token - b.kv_bytes_per_token);
      chart.append(svg("polyline", { points: line.map((point) => place(point).join(",")).join(" "), fill: "none", stroke: colour(index), "stroke-width": 1.5, opacity: 0.55 }));
      for (const point of line) {
        const text = [
          `${point.name}${point.pareto ? " (front)" : ""}`,
          `${bytes(point.kv_bytes_per_token)} a token, ${percent(point.kv_bytes_per_token / whole)}`,
          `KL ${number(point.kl)}${point.predicted_kl === null ? "" : `, predicted ${number(point.predicted_kl)}`}`,
          `perplexity ${number(point.perplexity, 4)}, top-1 ${percent(point.top1_agreement)}`,
        ].join("\n");
        chart.append(svg("path", { class: "mark", d: shape(index, ...place(point)), fill: colour(index), stroke: "var(--surface)", tabindex: 0, "data-tip": text, role: "img", "aria-label": text }));
      }
    });
    plot.replaceChildren(chart);
  };
  section("Loss against cache", "The dashed line is the front: no other point has both a smaller cache and a smaller loss. A name below hides its points.",
    element("div", { class: "controls" }, ...buttons), plot, legend);
  drawn(draw);
}

// ---- Every point -----------------------------------------------------------------------------------------------------

function points() {
  const predicted = made.some((point) => point.predicted_kl !== null);
  const budgets = data.points.some((point) => point.budget !== null);
  const columns = [
    { name: "point", of: (point) => point.name, show: (value) => value, word: true },
    { name: "methods", of: methodsOf, show: (value) => value, word: true },
    { name: "asked for", of: (point) => point.share, show: (value) => percent(value) },
    budgets ? { name: "budget", of: (point) => point.budget || "", show: (value) => value || "–", word: true } : null,
    { name: "cache/token", of: (point) => point.kv_bytes_per_token, show: bytes },
    { name: "kept", of: (point) => point.kv_bytes_per_token / whole, show: (value) => percent(value) },
    { name: "KL", of: (point) => point.kl, show: (value) => number(value) },
    predicted ? { name: "predicted KL", of: (point) => point.predicted_kl, show: (value) => number(value) } : null,
    { name: "perplexity", of: (point) => point.perplexity, show: (value) => number(value, 4) },
    { name: "top-1", of: (point) => point.top1_agreement, show: (value) => percent(value) },
    { name: "tokens/s", of: (point) => point.decode_tokens_per_second, show: (value) => number(value) },
    { name: "fit took", of: (point) => point.seconds, show: (value) => (value === null ? "–" : `${number(value)}\u00a0s`) },
  ].filter(Boolean);
  const table = element("table");
  const heads = columns.map((column, index) =>
    element("th", { scope: "col", class: column.word ? "word" : null }, element("button", { type: "button", onclick: () => sort(index) }, column.name)),
  );
  const bodies = data.points.map((point) => {
    const body = element("tbody", { class: point.pareto ? "front" : null });
    if (point.reason === null) {
      const cells = columns.map((column, index) => {
        const value = column.of(point);
        const shown = value === null ? "–" : column.show(value);
        const badge = index === 0 && point.pareto ? element("span", { class: "badge", title: "on the front" }, " ★") : null;
        const empty = shown === "–" ? " empty" : "";
        return element("td", { class: (column.word ? "word" : "") + empty, "data-label": index ? column.name : null }, element("span", {}, shown, badge));
      });
      body.append(element("tr", {}, ...cells));
    } else {
      body.append(element("tr", {}, element("td", { class: "word" }, point.name),
        element("td", { class: "reason", colspan: columns.length - 1 }, `Cannot be made: ${point.reason}`)));
    }
    const commands = point.commands.join("\n");
    const copy = element("button", { type: "button" }, "Copy");
    copy.onclick = () => {
      const done = () => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy"; }, 1500); };
      if (navigator.clipboard) navigator.clipboard.writeText(commands).then(done, () => select(code));
      else select(code);
    };
    const code = element("pre", {}, commands);
    body.append(element("tr", { class: "commands" }, element("td", { colspan: columns.length },
      element("details", {}, element("summary", {}, "commands"), code, copy))));
    return { body, point };
  });
  const select = (node) => getSelection().selectAllChildren(node);
  const reference = { name: "original", key_composition: null, value_composition: null, ...data.reference };
  const original = element("tbody", { class: "original" }, element("tr", {}, ...columns.map((column, index) => {
    const value = { point: "original", "cache/token": bytes(whole), kept: percent(1), perplexity: number(reference.perplexity, 4) }[column.name];
    return element("td", { class: (column.word ? "word" : "") + (value ? "" : " empty"), "data-label": index ? column.name : null }, value || "–");
  })));
  let sorted = null, upwards = true;
  const sort = (index) => {
    upwards = sorted === index ? !upwards : true;
    sorted = index;
    const value = (entry) => (entry.point.reason === null ? columns[index].of(entry.point) : null);
    const order = [...bodies].sort((a, b) => {
      const [first, second] = [value(a), value(b)];
      if (first === null || second === null) return (first === null) - (second === null);
      const difference = typeof first === "string" ? first.localeCompare(second, "en", { numeric: true }) : first - second;
      return upwards ? difference : -difference;
    });
    heads.forEach((head, at) => {
      if (at === index) head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    table.append(...order.map((entry) => entry.body), original);
  };
  table.append(element("thead", {}, element("tr", {}, ...heads)), ...bodies.map((entry) => entry.body), original);
  section("Every point", "A heading sorts. ★ marks the front. The commands make a point again and measure it.", table);
}

// ---- Heat maps -------------------------------------------------------------------------------------------------------

/** A grid of cells; `cell(row, column)` gives share, tip and perhaps text. */
function heatmap(width, rows, columns, cell, options = {}) {
  const left = options.left ?? 52, top = options.top ?? 4, below = options.below ?? 34;
  const size = (width - left - 4) / columns.length;
  const high = options.square ? size : Math.min(44, Math.max(22, size));
  const height = top + rows.length * high + below;
  const map = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": options.label || null });
  rows.forEach((row, y) => {
    if (row !== "") map.append(svg("text", { x: left - 6, y: top + (y + 0.5) * high + 4, "text-anchor": "end" }, row));
    columns.forEach((column, x) => {
      const { share, text, written } = cell(y, x);
      const paint = share === null ? { fill: "none", text: style("--muted") } : shade(share);
      const gap = size > 8 ? 1 : 0;
      map.append(svg("rect", {
        class: "cell", x: left + x * size, y: top + y * high, width: Math.max(1, size - gap), height: Math.max(1, high - gap),
        rx: size > 14 ? 2 : 0, fill: paint.fill, stroke: share === null ? "var(--line)" : "none", "data-tip": text,
      }));
      if (written && size > 30) {
        const label = svg("text", { x: left + (x + 0.5) * size, y: top + (y + 0.5) * high + 4, "text-anchor": "middle", "pointer-events": "none" }, written);
        label.style.fill = paint.text;
        map.append(label);
      }
    });
  });
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * size > 26) || 100;
  columns.forEach((column, x) => {
    if (x % every === 0) map.append(svg("text", { x: left + (x + 0.5) * size, y: top + rows.length * high + 14, "text-anchor": "middle" }, column));
  });
  if (options.title) map.append(svg("text", { class: "title", x: left + (width - left) / 2, y: height - 4, "text-anchor": "middle" }, options.title));
  return map;
}

function scaleBar(low, high) {
  return element("div", { class: "scale" }, low, element("i"), high);
}

function chooser(label, options, change) {
  const select = element("select");
  options.forEach((option, index) => select.append(element("option", { value: index }, option)));
  select.oninput = () => change(Number(select.value));
  return element("label", {}, label, select);
}

function slider(label, count, show, change) {
  const input = element("input", { type: "range", min: 0, max: count - 1, value: 0, step: 1 });
  const output = element("output", {}, show(0));
  input.oninput = () => { output.textContent = show(Number(input.value)); change(Number(input.value)); };
  return element("label", {}, label, input, output);
}

const SIDES = { key: "keys", value: "values", both: "both" };

function profiles() {
  if (!data.profiles.length) return;
  let chosen = 0, width = 0;
  const controls = element("div", { class: "controls" });
  const plot = element("div", { class: "plot" });
  const bar = element("div");
  const widthsOf = (profile) => [...new Set(profile.points.map((point) => point.components))].sort((a, b) => a - b);
  const nearest = (profile) => {
    const widths = widthsOf(profile);
    const half = widths[widths.length - 1] / 2;
    return widths.reduce((best, value, index) => (Math.abs(value - half) < Math.abs(widths[best] - half) ? index : best), 0);
  };
  const draw = () => {
    const profile = data.profiles[chosen];
    const widths = widthsOf(profile);
    const sides = [...new Set(profile.points.map((point) => point.side))];
    const layers = [...Array(profile.layers ?? 1 + Math.max(...profile.points.map((point) => point.layer))).keys()];
    // The strongest cell is the worst of all widths, so that widths can be compared.
    const costs = profile.points.map((point) => point.kl).filter((kl) => kl > 0);
    const low = Math.log(Math.max(Math.min(...costs), Math.max(...costs) / 1e4)), high = Math.log(Math.max(...costs));
    const share = (kl) => (kl <= 0 ? 0 : (Math.log(kl) - low) / (high - low || 1));
    plot.replaceChildren(heatmap(Math.max(280, plot.clientWidth), sides.map((side) => SIDES[side]), layers, (y, x) => {
      const point = profile.points.find((one) => one.layer === layers[x] && one.side === sides[y] && one.components === widths[width]);
      if (!point) return { share: null, text: `layer ${layers[x]}, ${SIDES[sides[y]]}: not measured at this width` };
      const text = `layer ${point.layer}, ${SIDES[point.side]}\n${number(point.components)} component heads\nKL ${number(point.kl)}, cross-entropy ${point.cross_entropy >= 0 ? "+" : ""}${number(point.cross_entropy)}`;
      return { share: share(point.kl), text };
    }, { title: "layer", label: "KL by layer and side" }));
    bar.replaceChildren(scaleBar(number(Math.exp(low), 2), `${number(Math.exp(high), 2)} nats/token`));
  };
  const show = (index) => `${number(widthsOf(data.profiles[chosen])[index])} of ${number(wholeOf(data.profiles[chosen]))} heads`;
  const wholeOf = (profile) => profile.heads * (profile.points.some((point) => point.side === "both") ? 2 : 1);
  const arrange = () => {
    width = nearest(data.profiles[chosen]);
    const range = slider("width kept", widthsOf(data.profiles[chosen]).length, show, (index) => { width = index; draw(); });
    const input = range.querySelector("input");
    input.value = width;
    range.querySelector("output").textContent = show(width);
    const names = data.profiles.map((profile) => `${profile.key_composition} + ${profile.value_composition}`);
    const pick = names.length > 1 ? chooser("methods", names, (index) => { chosen = index; arrange(); draw(); }) : null;
    if (pick) pick.querySelector("select").value = chosen;
    controls.replaceChildren(...[pick, range].filter(Boolean));
  };
  arrange();
  section("What each layer costs", "KL when one side of one layer is compressed and nothing else. The stronger the colour, the more it costs; the scale is logarithmic.", controls, plot, bar);
  drawn(draw);
}

function widths() {
  const varied = made.filter((point) => point.widths && new Set(point.widths.map((pair) => pair.join())).size > 1);
  if (!varied.length) return;
  let chosen = 0;
  const plot = element("div", { class: "plot" });
  const draw = () => {
    const point = varied[chosen];
    const most = Math.max(...point.widths.flat());
    plot.replaceChildren(heatmap(Math.max(280, plot.clientWidth), ["keys", "values"], [...point.widths.keys()], (y, x) => {
      const kept = point.widths[x][y];
      return { share: kept / most, text: `layer ${x}, ${["keys", "values"][y]}\n${number(kept)} component heads`, written: number(kept, 2) };
    }, { title: "layer", label: "component heads by layer and side" }));
  };
  section("Where the budget goes", "Component heads that each side of each layer keeps.",
    element("div", { class: "controls" }, chooser("point", varied.map((point) => point.name), (index) => { chosen = index; draw(); })), plot, scaleBar("0", "most"));
  drawn(draw);
}

// ---- Heads -----------------------------------------------------------------------------------------------------------

function spectra() {
  const plots = Object.fromEntries(["key", "value"].map((side) => [side, element("div")]));
  const draw = () => {
    for (const [side, plot] of Object.entries(plots)) {
      const width = Math.max(280, plot.clientWidth);
      const values = data.heads.flatMap((layer) => layer[side].spectrum).filter((value) => value > 1e-4);
      const most = Math.max(...data.heads.map((layer) => layer[side].channels));
      const { chart, across, up } = axes(width, 270,
        { low: 1, high: most, label: "rank", show: (value) => number(value) },
        { low: Math.min(...values), high: 1, logarithmic: true, label: "singular value", show: (value) => number(value, 1) });
      data.heads.forEach((layer, index) => {
        const place = layer[side].ranks.map((rank, at) => [rank, layer[side].spectrum[at]]).filter(([, value]) => value >= Math.min(...values));
        const line = place.map(([rank, value]) => `${across(rank).toFixed(1)},${up(value).toFixed(1)}`).join(" ");
        const energy = layer[side].spectrum.map((value) => value ** 2);
        const half = Math.round(layer[side].channels / 2);
        const at = layer[side].ranks.reduce((best, rank, position) => (Math.abs(rank - half) < Math.abs(layer[side].ranks[best] - half) ? position : best), 0);
        const depth = data.heads.length > 1 ? index / (data.heads.length - 1) : 1;
        const text = `layer ${layer.layer}, ${SIDES[side]}\nat rank ${layer[side].ranks[at]} of ${layer[side].channels}: ${number(Math.sqrt(energy[at]))} of the largest`;
        const stroke = shade(0.25 + 0.75 * depth).fill;
        const path = svg("polyline", { points: line, fill: "none", stroke, "stroke-width": 1.5 });
        const wide = svg("polyline", { points: line, fill: "none", stroke: "transparent", "stroke-width": 9, "data-tip": text });
        wide.onpointerenter = () => { path.setAttribute("stroke", "var(--c1)"); path.setAttribute("stroke-width", 3); };
        wide.onpointerleave = () => { path.setAttribute("stroke", stroke); path.setAttribute("stroke-width", 1.5); };
        chart.append(path, wide);
      });
      plot.replaceChildren(element("h3", {}, side === "key" ? "Keys" : "Values"), chart);
    }
  };
  section("Singular spectra", "Singular values of what the heads of a layer send on the text, as shares of the largest: a line for each layer, pale for the first. The faster a line falls, the fewer components the layer needs.",
    element("div", { class: "pair" }, ...Object.values(plots)), scaleBar("first layer", "last"));
  drawn(draw);
}

function similarity() {
  if (!data.heads.some((layer) => layer.key.order || layer.value.order)) return;
  let chosen = Math.floor(data.heads.length / 2);
  const four = element("div", { class: "four" });
  const draw = () => {
    const layer = data.heads[chosen];
    const places = [0, 1, 2, 3].map(() => element("div"));
    four.replaceChildren(...places); // all of them first: they share the width
    for (const side of ["key", "value"]) {
      for (const moment of ["before", "after"]) {
        const place = places.shift();
        const title = element("h3", {}, `${side === "key" ? "Keys" : "Values"}, ${moment === "before" ? "as they are" : "aligned"}`);
        const matrix = layer[side][moment];
        if (!matrix) {
          place.append(title, element("p", {}, "Not aligned: a norm leaves these heads nothing to, or they are looked at as they are cached."));
          continue;
        }
        const names = layer[side].order;
        place.append(title, heatmap(Math.max(180, place.clientWidth), names, names, (y, x) => ({
          share: matrix[y][x], written: number(matrix[y][x], 2),
          text: `layer ${layer.layer}, ${SIDES[side]} ${names[y]} and ${names[x]}\n${number(matrix[y][x], 2)} ${moment === "before" ? "as they are" : "aligned"}`,
        }), { square: true, left: 24, below: 18, label: `similarity of ${SIDES[side]}` }));
      }
    }
  };
  const range = slider("layer", data.heads.length, (index) => String(data.heads[index].layer), (index) => { chosen = index; draw(); });
  range.querySelector("input").value = chosen;
  range.querySelector("output").textContent = String(data.heads[chosen].layer);
  section("How alike heads are", "Sizes of the cosines between the heads of a layer, as they are and in the basis to which attention allows them to be rotated; ordered so that heads that are alike lie side by side.",
    element("div", { class: "controls" }, range), four, scaleBar("0", "1"));
  drawn(draw);
}

function retrieval() {
  const measured = made.filter((point) => point.retrieval);
  if (!measured.length) return;
  const tasks = [...new Set(measured[0].retrieval.map((cell) => cell.task))];
  const models = [["original", data.reference.retrieval], ...measured.map((point) => [point.name, point.retrieval])].filter(([, cells]) => cells);
  let task = tasks[0];
  const grid = element("div", { class: "four" });
  const draw = () => {
    const places = models.map(() => element("div"));
    grid.replaceChildren(...places); // all of them first: they share the width
    models.forEach(([name, cells], index) => {
      const mine = cells.filter((cell) => cell.task === task);
      const lengths = [...new Set(mine.map((cell) => cell.length))];
      const depths = [...new Set(mine.map((cell) => cell.depth))];
      const place = places[index];
      place.append(element("h3", {}, name), heatmap(Math.max(180, place.clientWidth), depths.map((depth) => percent(depth)), lengths, (y, x) => {
        const cell = mine.find((one) => one.depth === depths[y] && one.length === lengths[x]);
        return {
          share: cell.exact_match, written: `${Math.round(100 * cell.exact_match)}`,
          text: `${name}\n${cell.length.toLocaleString("en")} tokens, depth ${percent(cell.depth)}\n${percent(cell.exact_match)} of ${cell.prompts} found`,
        };
      }, { title: "tokens", label: `retrieval of ${name}` }));
    });
  };
  section("Retrieval", "Numbers hidden in the text that were found, in per cent, by length of the text and depth at which they lie.",
    element("div", { class: "controls" }, chooser("task", tasks, (index) => { task = tasks[index]; draw(); })), grid, scaleBar("none", "all"));
  drawn(draw);
}

function footer() {
  const versions = Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  page.append(element("footer", {}, "Made by", element("pre", {}, data.command), `with ${versions}.`));
}

header();
tradeoff();
points();
profiles();
widths();
spectra();
similarity();
retrieval();
footer();

let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => drawings.forEach((draw) => draw()));
});
