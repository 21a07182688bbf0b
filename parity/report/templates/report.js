(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("site");
  const hint = document.getElementById("hint");
  const cells = [...document.querySelectorAll(".grid button")];
  const cellOf = new Map(cells.map((cell) => [Number(cell.dataset.i), cell]));

  function element(name, text, attributes) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  }

  function drawn(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  }

  function number(value, decimals) {
    if (value === null) return "–";
    if (typeof value === "string") return value;
    if (decimals) return value.toFixed(decimals);
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(value);
  }

  // `word` is one of those that the page explains.
  function fact(list, name, value, word) {
    const term = element("dt", word ? undefined : name);
    if (word) term.append(element("button", name, { type: "button", class: "word", popovertarget: `word-${word}` }));
    list.append(term, element("dd", value));
  }

  // Small bars on a logarithmic scale; the dashed line is the floor, 1.
  // `starts` are places at which a call begins.
  function bars(values, title, from, to, starts = []) {
    const finite = values.filter((v) => typeof v === "number");
    const top = Math.max(4, ...finite), low = 0.25;
    const height = (v) => {
      if (typeof v !== "number") return v === "-∞" ? 0 : 64;
      return v <= low ? 0 : (64 * Math.log(v / low)) / Math.log(top / low);
    };
    const svg = drawn("svg", { class: "bars", viewBox: `0 0 ${values.length} 64`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}; largest ${number(Math.max(...finite, 0))} times the floor` });
    values.forEach((v, i) => {
      const h = Math.max(height(v), 0.5), colour = typeof v === "number" && v <= data.rounding ? "low" : "high";
      svg.append(drawn("rect", { x: i + 0.04, y: 64 - h, width: 0.92, height: h, class: colour }));
    });
    starts.forEach((x) => svg.append(drawn("line", { x1: x, x2: x, y1: 0, y2: 64, class: "call" })));
    const y = 64 - height(1);
    svg.append(drawn("line", { x1: 0, x2: values.length, y1: y, y2: y }));
    const axis = element("div", undefined, { class: "axis" });
    axis.append(element("span", from), element("span", `largest ${number(Math.max(...finite, 0))}x; dashed: 1x`), element("span", to));
    panel.append(element("h4", title), svg, axis);
  }

  function structure(s) {
    if (s.by_token.length > 1) {
      bars(s.by_token, s.width > 1 ? `Ratio by token, ${s.width} in a bar` : "Ratio by token", "token 0", `token ${data.tokens - 1}`, data.calls.map((start) => start / s.width));
    }
    if (s.by_head.length > 1) bars(s.by_head, "Ratio by head", "head 0", `head ${s.by_head.length - 1}`);
    const list = element("dl");
    if (s.first_token !== null) fact(list, "first token beyond rounding", String(s.first_token));
    fact(list, "gain of the error", number(s.gain), "gain");
    fact(list, "error · value, cosine", number(s.cosine));
    fact(list, `energy in channel ${s.channel}`, typeof s.share === "number" ? `${(100 * s.share).toFixed(1)} %` : number(s.share));
    panel.append(list);
  }

  // The total errors above are of the whole run; this is of the operation alone.
  function ulps(counts, equal) {
    panel.append(element("h4", "Local error in ULP: candidate and reference, both on the candidate's inputs"));
    if (equal || counts === null) {
      panel.append(element("p", equal ? "All values are equal." : "Not recorded.", { class: "none" }));
      return;
    }
    const total = counts.reduce((sum, count) => sum + count, 0), most = Math.max(...counts);
    const table = element("table", undefined, { class: "ulps" });
    counts.forEach((count, i) => {
      const row = table.insertRow(), bar = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
      bar.append(drawn("rect", { width: (100 * count) / most, height: 10 }));
      row.append(element("th", data.ulp_bins[i], { scope: "row" }));
      row.insertCell().append(bar);
      row.insertCell().textContent = share(count, total);
    });
    panel.append(table, element("p", `of ${total.toLocaleString("en")} values`, { class: "axis" }));
  }

  function share(count, total) {
    const percent = (100 * count) / total;
    if (percent > 0 && percent < 0.01) return "< 0.01 %";
    return `${percent.toFixed(percent < 10 ? 2 : 1)} %`;
  }

  // On a small screen details that were asked for lie over the map; those of the beginning, below it.
  function show(index, asked = true) {
    const site = data.sites[index];
    if (!site) return false;
    panel.replaceChildren();
    panel.classList.toggle("open", asked);
    panel.dataset.shown = index;
    const close = element("button", "×", { type: "button", class: "close", "aria-label": "Close the details" });
    close.addEventListener("click", hide);
    const badge = element("span", site.verdict, { class: `badge v-${site.verdict}` });
    const line = element("p", undefined, { class: "reason" });
    line.append(badge, ` ${data.texts[site.reason]}`);
    panel.append(close, element("h3", site.name), line);
    const list = element("dl");
    data.columns.forEach((column) => {
      if (column.key in site.values) fact(list, column.meaning, number(site.values[column.key], column.decimals), column.word);
    });
    if (site.bit_equal !== null) fact(list, "bit-equal, same inputs", site.bit_equal ? "yes" : "no");
    if (site.dtype) fact(list, "dtype", site.dtype);
    if (site.shape.length) fact(list, "shape", site.shape.join(" × "));
    panel.append(list);
    if (site.bit_equal !== null) ulps(site.ulps, site.bit_equal);
    if (site.structure) structure(site.structure);
    if (site.steps.length) {
      panel.append(element("h4", "Alignment"));
      const items = element("ul");
      site.steps.forEach((step) => items.append(element("li", data.texts[step])));
      panel.append(items);
    }
    cells.forEach((cell) => cell.removeAttribute("aria-pressed"));
    const cell = cellOf.get(index);
    if (cell) cell.setAttribute("aria-pressed", "true");
    return true;
  }

  function hide() {
    const cell = cellOf.get(Number(panel.dataset.shown));
    delete panel.dataset.shown;
    panel.classList.remove("open");
    panel.replaceChildren(hint);
    cells.forEach((each) => each.removeAttribute("aria-pressed"));
    if (cell) cell.focus({ preventScroll: true });
  }

  // One cell of the map is in the tab order; arrow keys move among the others.
  function focusable(cell) {
    cells.forEach((each) => (each.tabIndex = -1));
    cell.tabIndex = 0;
  }

  function neighbour(cell, rows, columns) {
    const row = cell.closest("tr"), body = row.parentElement;
    const inRow = (r) => [...r.querySelectorAll("button")];
    if (columns) return inRow(row)[inRow(row).indexOf(cell) + columns];
    const next = body.rows[row.sectionRowIndex + rows];
    if (!next) return undefined;
    const place = cell.parentElement.cellIndex;
    return next.cells[place]?.querySelector("button") || inRow(next).at(place > 1 ? -1 : 0);
  }

  function setUpMap() {
    const table = document.querySelector(".grid");
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("button");
      if (!cell) return;
      focusable(cell);
      show(Number(cell.dataset.i));
    });
    const MOVES = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    table.addEventListener("keydown", (event) => {
      const move = MOVES[event.key], cell = event.target.closest("button");
      if (!move || !cell) return;
      event.preventDefault();
      const next = neighbour(cell, ...move);
      if (!next) return;
      focusable(next);
      next.focus();
      if (panel.dataset.shown !== undefined) show(Number(next.dataset.i));
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && panel.dataset.shown !== undefined) hide();
    });
    document.querySelectorAll("a[data-site]").forEach((link) =>
      link.addEventListener("click", (event) => {
        event.preventDefault();
        open(Number(link.dataset.site));
      }));
    if (cells.length) focusable(cells[0]);
  }

  function open(index) {
    const cell = cellOf.get(index);
    if (!show(index) || !cell) return;
    focusable(cell);
    // On a small screen the details cover the lower half.
    const small = matchMedia("(max-width: 1100px)").matches;
    cell.scrollIntoView({ block: small ? "start" : "center", inline: "center" });
    cell.focus({ preventScroll: true });
  }

  function setUpTable() {
    const table = document.getElementById("rows"), body = table.tBodies[0];
    const filter = document.getElementById("filter"), output = filter.querySelector("output");
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) =>
      head.querySelector("button").addEventListener("click", () => {
        const before = new Map(rows.map((row) => [row, row.getBoundingClientRect().top]));
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numeric = head.querySelector("button").hasAttribute("data-numeric");
        const key = (row) => (numeric ? value(row.cells[column].dataset.v) : row.cells[column].textContent);
        const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0);
        body.append(...[...rows].sort((a, b) => (down ? order(b, a) : order(a, b))));
        follow(before);
      }));
    const apply = () => {
      const wanted = filter.querySelector("input[type=search]").value.trim().toLowerCase();
      const bad = filter.querySelector("input[type=checkbox]").checked;
      let shown = 0;
      rows.forEach((row) => {
        const fits = row.textContent.toLowerCase().includes(wanted);
        row.hidden = !fits || (bad && ["exact", "rounding"].includes(row.dataset.verdict));
        shown += !row.hidden;
      });
      output.textContent = `${shown} of ${rows.length} rows`;
    };
    filter.addEventListener("input", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  // Each row moves to its new place from where it was, so that the eye can follow it.
  function follow(before) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    before.forEach((top, row) => {
      const moved = top - row.getBoundingClientRect().top;
      if (moved) row.animate([{ transform: `translateY(${moved}px)` }, { transform: "none" }], { duration: 300, easing: "ease-out" });
    });
  }

  // Where a page from the disk may not write to the clipboard, what is selected can still be copied.
  function copyBySelection(text) {
    const field = element("textarea", text, { readonly: "" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }

  function setUpCopying() {
    document.querySelectorAll("[data-copy]").forEach((place) => {
      const button = element("button", "Copy", { type: "button", class: "copy" });
      button.addEventListener("click", async () => {
        const done = await navigator.clipboard.writeText(place.dataset.copy).then(() => true, () => copyBySelection(place.dataset.copy));
        button.textContent = done ? "Copied" : "Not allowed here";
        setTimeout(() => (button.textContent = "Copy"), 2000);
      });
      place.prepend(button);
    });
  }

  // Python writes inf and nan; NaN is worse than any number.
  function value(text) {
    if (text === "inf" || text === "nan") return Infinity;
    return text === "-inf" ? -Infinity : Number(text);
  }

  setUpMap();
  setUpTable();
  setUpCopying();
  const wanted = /^#site-(\d+)$/.exec(location.hash);
  const worst = document.querySelector("a[data-site]");
  if (wanted) open(Number(wanted[1]));
  else if (worst) show(Number(worst.dataset.site), false);
})();
