// Draws with model.onnx, the whole sampler in one file, one step a call so that each can be seen.
// facts.json holds what is needed besides: class names, shapes and the solver's tables by number of steps.

const SNAPSHOTS = 10; // images of a trajectory, besides the last
const MOST_BUTTONS = 50;

const byId = (id) => document.getElementById(id);
const say = (text) => (byId("status").textContent = text);
/** What a promise gives; where it fails, the status line says which file does not load. */
const loaded = (name, promise) =>
  promise.catch((error) => {
    say(`${name} does not load: ${error.message}`);
    throw error;
  });
if (!globalThis.ort) {
  say("ort/ort.wasm.min.js does not load.");
  throw new Error("ort/ort.wasm.min.js does not load");
}
const facts = await loaded("facts.json", fetch("facts.json").then((answer) => answer.json()));
ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
ort.env.logLevel = "error";
const session = await loaded("model.onnx", ort.InferenceSession.create("model.onnx"));

/** Uniform numbers in 0..1 of a 32-bit seed (mulberry32), so that a seed means the same image in every browser. */
function uniform(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** An array of normal numbers (Box and Muller). */
function normal(next, length) {
  return Float32Array.from({ length }, () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()));
}

/** What solvers of several steps remember: the sum that a row adds, and the estimate that follows from its result.
 *
 * The file is called with one row, so that it remembers nothing itself: the sum goes in as noise of weight 1, with the
 * row's own noise in it.
 */
class Memory {
  constructor(length) {
    this.estimates = []; // the latest first
    this.length = length;
  }
  sum(row, noise) {
    const weights = [row[6], ...row.slice(9)];
    const total = noise.map((value) => row[7] * value);
    this.estimates.forEach((estimate, back) => {
      if (weights[back]) for (let i = 0; i < total.length; i++) total[i] += weights[back] * estimate[i];
    });
    return total;
  }
  keep(row, latents, added, result) {
    const [a, b] = [row[4], row[5]];
    this.estimates.unshift(latents.map((value, i) => (result[i] - a * value - added[i]) / b));
    this.estimates.length = Math.min(this.estimates.length, this.length);
  }
}

/** Samples one image; calls back with the step and its image, (height, width, channels) bytes with dims. */
async function sample(label, steps, seed, guidance, onStep) {
  const table = facts.tables[steps];
  const [channels, height, width] = facts.latents;
  const size = channels * height * width;
  const next = uniform(seed);
  let latents = normal(next, size);
  const remembers = table.some((row) => row[6] || row.slice(9).some(Boolean));
  const memory = new Memory(table[0].length - 8);
  for (const [step, row] of table.entries()) {
    const fresh = normal(next, size);
    const added = remembers ? memory.sum(row, fresh) : fresh;
    const single = Float32Array.from(row.slice(0, 9));
    if (remembers) single.set([0, 1, 0], 6); // c, noise, exponent
    const feeds = {
      latents: new ort.Tensor("float32", latents, [1, channels, height, width]),
      table: new ort.Tensor("float32", single, [1, 9]),
      noise: new ort.Tensor("float32", added, [1, 1, channels, height, width]),
    };
    if (label !== null) {
      const guided = facts.null_class !== null && guidance !== 1;
      const labels = guided ? [label, facts.null_class] : [label];
      feeds.class_labels = new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]);
    }
    if (facts.null_class !== null) feeds.guidance_scale = new ort.Tensor("float32", [guidance], []);
    const output = await session.run(feeds);
    if (remembers) memory.keep(row, latents, added, output.sample.data);
    latents = output.sample.data;
    await onStep(step + 1, output.images);
  }
}

/** A canvas of an image with its caption, at the end of a parent. */
function show(parent, image, caption) {
  const [, height, width, channels] = image.dims;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = image.data[channels * i + Math.min(c, channels - 1)];
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const figure = document.createElement("figure");
  figure.dataset.caption = caption;
  figure.append(canvas, Object.assign(document.createElement("figcaption"), { textContent: caption }));
  parent.append(figure);
}

/** What a field of numbers holds; null, after saying so, where that is not between its min and max as its step wants. */
function numberOf(id, description) {
  const field = byId(id);
  if (field.value !== "" && field.validity.valid) return field.valueAsNumber;
  say(`${description} from ${field.min} to ${field.max}.`);
  field.focus();
  return null;
}

/** Draws classes one after the other. */
async function draw(labels) {
  const steps = Number(byId("steps").value);
  const seed = numberOf("seed", "The seed must be a whole number");
  const guidance = facts.null_class === null ? 1 : numberOf("guidance", "Guidance must be a number");
  if (seed === null || guidance === null) return;
  const focused = document.activeElement;
  for (const id of ["settings", "classes"]) byId(id).disabled = true;
  byId("images").replaceChildren();
  const started = performance.now();
  try {
    await drawEach(labels, steps, seed, guidance);
    const seconds = ((performance.now() - started) / 1000).toFixed(2);
    say(`${labels.length} of ${labels.length} drawn in ${seconds} s`);
  } finally {
    for (const id of ["settings", "classes"]) byId(id).disabled = false;
    focused.focus({ preventScroll: true }); // which the browser takes from what is disabled
  }
}

async function drawEach(labels, steps, seed, guidance) {
  for (const label of labels) {
    const name = label === null ? "image" : facts.names[label];
    byId("trajectory").replaceChildren();
    await sample(label, steps, seed, guidance, async (step, image) => {
      say(`${name}: step ${step} of ${steps}`);
      const shown = Math.ceil((step * SNAPSHOTS) / steps) > Math.ceil(((step - 1) * SNAPSHOTS) / steps);
      if (shown || step === steps) show(byId("trajectory"), image, `step ${step}`);
      if (step === steps) show(byId("images"), image, name);
      await new Promise((resolve) => setTimeout(resolve)); // let the browser paint
    });
  }
}

function button(text, chosen) {
  const element = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  element.addEventListener("click", () => draw(chosen()).catch((error) => say(String(error))));
  byId("classes").append(element);
}

/** A list to choose from, where buttons would fill the page. */
function chooser(labels) {
  const list = document.createElement("select");
  list.setAttribute("aria-label", "Class");
  for (const label of labels) list.add(new Option(facts.names[label], label));
  byId("classes").append(list);
  button("draw", () => [Number(list.value)]);
}

document.title = byId("name").textContent = facts.title;
for (const steps of Object.keys(facts.tables)) byId("steps").add(new Option(steps));
byId("steps").value = facts.default_steps;
byId("guided").hidden = facts.null_class === null;
if (facts.license) byId("about").textContent += ` Licence of the model: ${facts.license}.`;
const labels = Object.keys(facts.names).map(Number);
if (labels.length > MOST_BUTTONS) chooser(labels);
else {
  for (const label of labels) button(facts.names[label], () => [label]);
  if (labels.length === 0) button("draw", () => [null]);
  if (labels.length > 1) button("all", () => labels);
}
for (const id of ["settings", "classes"]) byId(id).disabled = false;
say("Ready");
