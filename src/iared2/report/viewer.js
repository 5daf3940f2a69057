// The viewer of one photo: heat or what is kept on the photo, group by group, and the scores of the patch one points at.
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const integers = (text) => new Uint16Array(bytes(text).buffer);
const parse = (element) => JSON.parse(element.textContent);
const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
const amount = (macs) => (macs < 1e9 ? Number((macs / 1e6).toPrecision(3)) + " M" : Number((macs / 1e9).toPrecision(3)) + " G");
const score = (value) => (value / TOP).toFixed(3);
const spot = (place) => `row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`;
const short = (place) => `(${Math.floor(place / columns) + 1}, ${(place % columns) + 1})`;
const capital = (text) => text[0].toUpperCase() + text.slice(1);

const shared = parse(document.getElementById("shared"));
const TOP = 65535, GONE = TOP, OURS = -1; // 16-bit integers: 1, no carrier; the choice of the scores, which differ by group
const [rows, columns] = shared.grid, places = rows * columns, colours = bytes(shared.colours);

class Viewer {
  constructor(card, number) {
    const data = parse(card.querySelector(".numbers"));
    this.name = data.name;
    this.groups = data.groups;
    this.scores = integers(data.scores);
    this.carriers = integers(data.carriers);
    this.heads = data.heads && integers(data.heads);
    this.headCount = this.heads ? this.heads.length / this.scores.length : 0;
    this.methods = data.methods.map((method) => ({ ...method, values: integers(method.values) }));
    Object.assign(this, { group: Math.min(1, shared.groups - 1), view: "scores", method: OURS });
    this.opacity = { scores: 100 * shared.heat, kept: 100 };
    this.chosen = this.pointed = this.best(); // something to begin with
    this.root = document.getElementById("viewer").content.cloneNode(true).firstElementChild;
    this.number = number;
    this.connect(card);
    card.insertBefore(this.root, card.querySelector(".overview"));
    card.classList.add("viewed"); // the overview need not show what stands above it
    this.photo.decode().then(() => { this.fit(); this.update(); });
  }

  // The patch that the last group scores highest.
  best() {
    const last = this.scores.subarray((shared.groups - 1) * places);
    return last.indexOf(Math.max(...last));
  }

  find(name) { return this.root.querySelector(name); }

  connect(card) {
    [this.photo, this.canvas, this.grid] = ["img", "canvas", ".patches"].map((name) => this.find(name));
    const original = card.querySelector(".column.photo img");
    this.photo.src = original.src;
    this.photo.alt = original.alt;
    const named = (name) => `${name}-${this.number}`;
    for (const element of this.root.querySelectorAll("[data-id]")) element.id = named(element.dataset.id);
    for (const element of this.root.querySelectorAll("[data-for]")) element.setAttribute(element.dataset.as, named(element.dataset.for));
    const extras = card.querySelectorAll(".column.photo > :is(.predictions, .notes)");
    for (const extra of extras) this.find(".panel .patch").before(extra.cloneNode(true));
    this.connectChoices();
    this.connectSliders();
    this.connectPatches();
  }

  connectChoices() {
    for (const radio of this.root.querySelectorAll("input[type=radio]")) {
      radio.name = `view-${this.number}`;
      radio.addEventListener("change", () => { this.view = radio.value; this.update(); });
    }
    const select = this.find("select");
    this.methods.forEach((method, index) => select.add(new Option(method.name, index)));
    select.closest(".line").hidden = !this.methods.length;
    select.addEventListener("change", () => { this.method = Number(select.value); this.update(); });
  }

  connectSliders() {
    const [group, opacity] = ["group", "opacity"].map((name) => this.find(`input.${name}`));
    group.max = shared.groups;
    group.value = this.group + 1;
    group.addEventListener("input", () => { this.group = group.value - 1; this.update(); });
    opacity.addEventListener("input", () => { this.opacity[this.view] = Number(opacity.value); this.fade(); });
  }

  connectPatches() {
    const { grid } = this;
    grid.setAttribute("aria-rowcount", rows);
    grid.setAttribute("aria-colcount", columns);
    grid.setAttribute("aria-label", `The ${rows} × ${columns} patches of ${this.name}; arrow keys move`);
    grid.addEventListener("focus", () => this.point(this.chosen));
    grid.addEventListener("pointermove", (event) => this.point(this.under(event), false));
    grid.addEventListener("pointerleave", () => this.point(this.chosen));
    grid.addEventListener("pointerdown", (event) => { this.chosen = this.under(event); this.point(this.chosen); });
    grid.addEventListener("keydown", (event) => this.move(event));
  }

  // ---- the picture

  fit() {
    const { naturalWidth: width, naturalHeight: height } = this.photo;
    Object.assign(this.canvas, { width, height });
    this.find(".frame").style.maxWidth = `${Math.max(96, Math.min(560, (600 * width) / height))}px`;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(this.photo, 0, 0, width, height);
    this.pixels = context.getImageData(0, 0, width, height).data;
  }

  // Interpolated between the centres of patches, as in the pictures beside the page.
  heat(data, values) {
    const { width, height } = this.canvas;
    const sides = (size, count) => Array.from({ length: size }, (_, pixel) => {
      const at = Math.min(Math.max(((pixel + 0.5) * count) / size - 0.5, 0), count - 1), low = Math.floor(at);
      return [low, Math.min(low + 1, count - 1), at - low];
    });
    const across = sides(width, columns);
    sides(height, rows).forEach(([up, down, y], line) => across.forEach(([left, right, x], pixel) => {
      const above = values[up * columns + left] * (1 - x) + values[up * columns + right] * x;
      const below = values[down * columns + left] * (1 - x) + values[down * columns + right] * x;
      const colour = 3 * Math.round(((above * (1 - y) + below * y) / TOP) * 255), place = 4 * (line * width + pixel);
      for (let part = 0; part < 3; part++) data[place + part] = colours[colour + part];
      data[place + 3] = 255;
    }));
  }

  // Pale and grey where no token stands any more; elsewhere the canvas is clear.
  pale(data) {
    const { width, height } = this.canvas;
    for (let line = 0; line < height; line++) {
      const row = Math.floor(((line + 0.5) * rows) / height) * columns;
      for (let pixel = 0; pixel < width; pixel++) {
        if (this.keeps(row + Math.floor(((pixel + 0.5) * columns) / width))) continue;
        const place = 4 * (line * width + pixel), [red, green, blue] = this.pixels.subarray(place, place + 3);
        const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
        shared.pale.forEach((tone, part) => { data[place + part] = grey * (1 - shared.fade) + tone * shared.fade; });
        data[place + 3] = 255;
      }
    }
  }

  draw() {
    const context = this.canvas.getContext("2d"), image = context.createImageData(this.canvas.width, this.canvas.height);
    if (this.view === "kept") this.pale(image.data);
    else this.heat(image.data, this.method === OURS ? this.scores.subarray(this.group * places) : this.methods[this.method].values);
    context.putImageData(image, 0, 0);
    this.photo.classList.toggle("grey", this.view === "scores");
    const what = this.method === OURS ? `Scores of group ${this.group + 1}` : `The map of ${this.methods[this.method].name}`;
    const share = percent(this.groups[this.group].keep_ratio);
    const kept = `The photo ${this.name} after group ${this.group + 1}: ${share} of its patches are kept, the others are pale`;
    this.canvas.setAttribute("aria-label", this.view === "kept" ? kept : `${what} over the photo ${this.name}, as colours`);
  }

  // ---- what is said

  update() {
    const kept = this.view === "kept", still = !kept && this.method !== OURS, method = this.methods[this.method];
    this.find("select").disabled = kept;
    this.find("input.group").disabled = still;
    this.find(".note").textContent = still ? this.about(method) : "";
    this.find("input.opacity").value = this.opacity[this.view];
    this.fade();
    this.draw();
    this.tell();
    this.point(this.pointed);
  }

  about({ name, low, high, fine }) {
    const range = `0 is its least value (${low.toPrecision(3)}), 1 its greatest (${high.toPrecision(3)})`;
    return `${name} gives one map that does not depend on the group. Stretched: ${range}${fine ? ", each the mean over a patch" : ""}.`;
  }

  fade() {
    const opacity = Math.round(this.opacity[this.view]);
    this.canvas.style.opacity = opacity / 100;
    this.find("output.opacity").textContent = `${opacity} %`;
    this.find("input.opacity").setAttribute("aria-valuetext", `${opacity} per cent`);
  }

  tell() {
    const group = this.groups[this.group], number = this.group + 1;
    const share = group.macs / shared.dense_macs;
    const fill = (name, text) => { this.find(name).textContent = text; };
    fill("output.group", `${number} of ${shared.groups}`);
    fill(".keeps dt", `Patches kept after group ${number}`);
    fill(".keeps .share", percent(group.keep_ratio));
    fill(".keeps small", `${group.kept} of ${places}`);
    fill(".costs dt", `Multiply-adds up to its end`);
    fill(".costs .share", amount(group.macs));
    fill(".costs small", `${percent(share)} of dense ${amount(shared.dense_macs)}`);
    this.find(".keeps .meter i").style.width = `${100 * group.keep_ratio}%`;
    this.find(".costs .meter i").style.width = `${100 * share}%`;
    const spoken = `${percent(group.keep_ratio)} of the patches kept, ${amount(group.macs)} multiply-adds`;
    this.find("input.group").setAttribute("aria-valuetext", `group ${number} of ${shared.groups}: ${spoken}`);
  }

  // ---- patches

  carrier(place, group = this.group) { return group < 0 ? place : this.carriers[group * places + place]; }

  keeps(place, group = this.group) { return this.carrier(place, group) === place; }

  // What became of a patch in a group, in a word or two.
  fate(place, group, name = spot) {
    const carrier = this.carrier(place, group), before = this.keeps(place, group - 1);
    if (carrier === place) return "kept";
    if (carrier === GONE) return before ? "dropped" : "gone";
    return `${before ? "merged into" : "carried by"} ${name(carrier)}`;
  }

  life(place) {
    const end = this.groups.findIndex((_, group) => !this.keeps(place, group));
    return end < 0 ? "kept to the end" : `${this.fate(place, end)} in group ${end + 1}`;
  }

  under(event) {
    const box = this.grid.getBoundingClientRect();
    const part = (value, size, count) => Math.min(Math.max(Math.floor((value / size) * count), 0), count - 1);
    return part(event.clientY - box.top, box.height, rows) * columns + part(event.clientX - box.left, box.width, columns);
  }

  move(event) {
    const place = this.chosen, column = place % columns, start = place - column;
    const steps = {
      ArrowLeft: Math.max(place - 1, start), ArrowRight: Math.min(place + 1, start + columns - 1),
      ArrowUp: place < columns ? place : place - columns, ArrowDown: place + columns < places ? place + columns : place,
      Home: event.ctrlKey ? 0 : start, End: event.ctrlKey ? places - 1 : start + columns - 1,
    };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.chosen = steps[event.key];
    this.point(this.chosen);
  }

  cell(place) {
    if (!this.cells) {
      const add = (parent, tag, attributes) => parent.appendChild(Object.assign(document.createElement(tag), attributes));
      for (let place = 0; place < places; place++) {
        if (place % columns === 0) add(this.grid, "div", { role: "row" });
        add(this.grid.lastChild, "span", { role: "gridcell", id: `cell-${this.number}-${place}` });
      }
      this.cells = this.grid.querySelectorAll("span");
    }
    return this.cells[place];
  }

  point(place, spoken = true) {
    for (const old of this.grid.querySelectorAll(".at, .carrier")) old.className = "";
    this.pointed = place;
    this.find(".life").textContent = `${capital(spot(place))}: ${this.life(place)}.`;
    this.find(".wide").replaceChildren(this.table(place));
    const maps = this.methods.map((method) => `${method.name} ${score(method.values[place])}`).join(", ");
    this.find(".maps").textContent = maps && `Maps here, stretched to 0 to 1: ${maps}.`;
    const at = this.cell(place), carrier = this.carrier(place);
    at.className = "at";
    if (carrier !== place && carrier !== GONE) this.cell(carrier).className = "carrier";
    if (!spoken) return;
    const method = this.view === "scores" && this.methods[this.method];
    const value = method ? `${method.name} ${score(method.values[place])}` : `score ${this.scoreOf(place, this.group)}`;
    at.setAttribute("aria-label", `${spot(place)}: ${value}, ${this.fate(place, this.group)} in group ${this.group + 1}`);
    this.grid.setAttribute("aria-activedescendant", at.id);
  }

  scoreOf(place, group, head = null) {
    if (!this.keeps(place, group - 1)) return "–"; // it has no token of its own, so nobody scored it
    if (head === null) return score(this.scores[group * places + place]);
    return score(this.heads[(group * this.headCount + head) * places + place]);
  }

  table(place) {
    const table = document.createElement("table"), heads = Array.from({ length: this.headCount }, (_, head) => head);
    table.setAttribute("aria-label", `Scores of the patch in ${spot(place)}`);
    const line = (parent, texts, headings) => {
      const row = parent.insertRow();
      texts.forEach((text, index) => {
        const box = row.appendChild(document.createElement(headings(index) ? "th" : "td"));
        if (headings(index)) box.scope = parent.tagName === "THEAD" ? "col" : "row";
        box.textContent = text;
      });
      return row;
    };
    line(table.createTHead(), ["Group", "after it", "mean", ...heads.map((head) => `head ${head + 1}`)], () => true);
    const body = table.createTBody();
    this.groups.forEach((_, group) => {
      const values = [null, ...heads].map((head) => this.scoreOf(place, group, head));
      const row = line(body, [group + 1, this.fate(place, group, short), ...values], (index) => index === 0);
      row.children[2].className = "mean";
      if (group === this.group) { row.className = "now"; row.setAttribute("aria-current", "true"); }
    });
    return table;
  }
}

const coming = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    coming.unobserve(target);
    new Viewer(target, [...target.parentElement.children].indexOf(target) + 1);
  }
}, { rootMargin: "800px" });
for (const card of document.querySelectorAll("article.card")) coming.observe(card);
const overviews = [...document.querySelectorAll(".overview")];
addEventListener("beforeprint", () => overviews.forEach((overview) => { overview.open = true; })); // paper has no sliders
