// The model in this folder: pictures and texts to features, classes, and a search. Nothing leaves the browser.

import * as ort from "./ort/ort.wasm.min.mjs";
import { decode, toInput } from "./pixels.js";
import { Tokenizer } from "./tokenizer.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more would need headers that few hosts send

const HERE = new URL("./", import.meta.url);
const BATCH = 16;

async function get(name, as) {
  const answer = await fetch(new URL(name, HERE));
  if (!answer.ok) throw new Error(`${name} can't be read (${answer.status} ${answer.statusText})`);
  return answer[as]();
}

export class Clip {
  static async load() {
    const clip = new Clip();
    clip.facts = await get("export.json", "json");
    if (clip.facts.text)
      clip.tokenizer = new Tokenizer(await get("tokenizer.json", "json"), await get("cleaning.json", "json"));
    clip.sessions = {};
    clip.classes = {}; // names and templates as text -> features
    return clip;
  }

  // `rows` inputs of the same size, one after the other in `data` -> an array of `rows` unit vectors.
  async run(tower, type, data, dims) {
    if (!(tower in this.facts.files)) throw new Error(`this model has no ${tower} tower`);
    this.sessions[tower] ??= ort.InferenceSession.create(new URL(this.facts.files[tower], HERE).href);
    const session = await this.sessions[tower];
    const found = (await session.run({ [session.inputNames[0]]: new ort.Tensor(type, data, dims) }))[session.outputNames[0]];
    const E = found.dims[1];
    return Array.from({ length: dims[0] }, (_, row) => unit(found.data.slice(row * E, (row + 1) * E)));
  }

  async encodeImages(files) {
    const { pixels, upright } = this.facts, R = pixels.size, features = [];
    for (let start = 0; start < files.length; start += BATCH) {
      const batch = files.slice(start, start + BATCH), data = new Float32Array(batch.length * 3 * R * R);
      for (const [row, file] of batch.entries())
        data.set(toInput(await decode(file, upright, pixels.style === "hf"), pixels), row * 3 * R * R);
      features.push(...(await this.run("image", "float32", data, [batch.length, 3, R, R])));
    }
    return features;
  }

  async encodeTexts(texts) {
    if (!this.tokenizer) throw new Error("this model has no texts that can be typed here");
    const features = [];
    for (let start = 0; start < texts.length; start += BATCH) {
      const rows = texts.slice(start, start + BATCH).map((text) => this.tokenizer.encode(text));
      const L = Math.max(...rows.map((ids) => ids.length)), data = new BigInt64Array(rows.length * L);
      rows.forEach((ids, row) => ids.forEach((id, column) => (data[row * L + column] = BigInt(id))));
      features.push(...(await this.run("text", "int64", data, [rows.length, L])));
    }
    return features;
  }

  // The mean of each class's prompts. Templates are for every class, or a list of prompts for each name.
  async classFeatures(names, templates) {
    const key = JSON.stringify([names, templates]);
    if (!(key in this.classes)) {
      const prompts = names.map((name) =>
        Array.isArray(templates) ? templates.map((each) => each.replaceAll("{c}", "{}").replaceAll("{}", () => name)) : templates[name]);
      const features = await this.encodeTexts(prompts.flat());
      let start = 0;
      this.classes[key] = prompts.map(({ length }) => {
        const own = features.slice(start, (start += length));
        return unit(own[0].map((_, e) => own.reduce((sum, each) => sum + each[e], 0) / length));
      });
    }
    return this.classes[key];
  }

  // For each file: all classes by falling cosine, with probabilities among them, and whether it is none of these.
  async classify(files, names = this.facts.classnames, templates = this.facts.templates) {
    const classes = await this.classFeatures(names, templates);
    return (await this.encodeImages(files)).map((image) => {
      const cosines = classes.map((each) => dot(image, each)), best = Math.max(...cosines);
      const odds = cosines.map((cosine) => Math.exp(this.facts.logit_scale * (cosine - best)));
      const total = odds.reduce((sum, each) => sum + each, 0);
      const guesses = names.map((name, c) => ({ name, cosine: cosines[c], probability: odds[c] / total }));
      guesses.sort((a, b) => b.cosine - a.cosine);
      return { guesses, isNone: this.facts.threshold !== null && best < this.facts.threshold };
    });
  }

  // The pictures of the folder's index that are closest to a unit feature: [{name, thumbnail, cosine}].
  async search(feature, most = 24) {
    this.index ??= Promise.all([get("search/index.json", "json"), get("search/features.bin", "arrayBuffer")]);
    const [pictures, buffer] = await this.index, all = new Float32Array(buffer), E = feature.length;
    const found = pictures.map((each, row) => ({ ...each, cosine: dot(feature, all.subarray(row * E, (row + 1) * E)) }));
    return found.sort((a, b) => b.cosine - a.cosine).slice(0, most);
  }
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function unit(x) {
  const length = Math.sqrt(dot(x, x));
  return x.map((each) => each / length);
}
