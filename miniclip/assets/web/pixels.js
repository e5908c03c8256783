// From a picture's file to a model's input, with Pillow's resampling, so that guesses are those of miniclip.

const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => {
    x = Math.abs(x);
    return x === 0 ? 1 : x >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x));
  }],
  bicubic: [2, (x) => {
    const a = -0.5;
    x = Math.abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const ONE = 2 ** 22; // Pillow multiplies whole numbers of so many steps to 1

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

// For each of `size` outputs: the first input that it sees, and the weights of those.
function windows(from, size, [reach, weigh]) {
  const scale = from / size, wide = Math.max(scale, 1), support = reach * wide;
  return Array.from({ length: size }, (_, out) => {
    const centre = (out + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, i) => weigh((i + first - centre + 0.5) * (1 / wide)));
    const total = weights.reduce((sum, each) => sum + each, 0);
    return { first, weights: weights.map((each) => roundAway((each / (total || 1)) * ONE)) };
  });
}

function roundAway(x) {
  return x < 0 ? Math.trunc(x - 0.5) : Math.trunc(x + 0.5);
}

function clip8(sum) {
  return Math.min(255, Math.max(0, Math.floor((sum + ONE / 2) / ONE)));
}

// `data` has `channels` bytes for each pixel of `width` x `height`. Columns first, then rows, rounded between.
export function resize({ data, width, height, channels }, newWidth, newHeight, filter) {
  if (filter === "nearest") return nearest({ data, width, height, channels }, newWidth, newHeight);
  if (newWidth !== width) {
    const across = windows(width, newWidth, FILTERS[filter]);
    const out = new Uint8ClampedArray(newWidth * height * channels);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < newWidth; x++) {
        const { first, weights } = across[x];
        for (let c = 0; c < channels; c++) {
          let sum = 0;
          for (let i = 0; i < weights.length; i++) sum += weights[i] * data[(y * width + first + i) * channels + c];
          out[(y * newWidth + x) * channels + c] = clip8(sum);
        }
      }
    [data, width] = [out, newWidth];
  }
  if (newHeight !== height) {
    const down = windows(height, newHeight, FILTERS[filter]);
    const out = new Uint8ClampedArray(width * newHeight * channels), row = width * channels;
    for (let y = 0; y < newHeight; y++) {
      const { first, weights } = down[y];
      for (let at = 0; at < row; at++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * data[(first + i) * row + at];
        out[y * row + at] = clip8(sum);
      }
    }
    [data, height] = [out, newHeight];
  }
  return { data, width, height, channels };
}

function nearest({ data, width, height, channels }, newWidth, newHeight) {
  const across = places(width, newWidth), down = places(height, newHeight);
  const out = new Uint8ClampedArray(newWidth * newHeight * channels);
  for (let y = 0; y < newHeight; y++)
    for (let x = 0; x < newWidth; x++) {
      const at = down[y] * width + across[x];
      for (let c = 0; c < channels; c++) out[(y * newWidth + x) * channels + c] = data[at * channels + c];
    }
  return { data: out, width: newWidth, height: newHeight, channels };
}

// Summed up as Pillow does, whose rounding decides between two neighbours that are equally near.
function places(from, size) {
  const step = from / size;
  let at = step * 0.5;
  return Array.from({ length: size }, () => {
    const place = Math.trunc(at);
    at += step;
    return place;
  });
}

// A file's pixels as they are in it: not converted to the screen's colours, and turned only where EXIF is to be followed.
// What a palette, or a PNG's list of transparent colours, makes transparent has the colour that is stored for it, as in
// Pillow's RGB; with `keepsTransparency` it stays transparent.
export async function decode(file, isUpright = false, keepsTransparency = false) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bytes = new Uint8Array(await file.arrayBuffer()), view = new DataView(bytes.buffer);
  const name = String.fromCharCode(...bytes.subarray(0, 8)), frame = name.startsWith("GIF8") ? firstFrame(bytes) : null;
  const isOpaque = frame && !(frame.flagsAt && keepsTransparency);
  if (isOpaque && frame.flagsAt) bytes[frame.flagsAt] &= ~1;
  const parts = kept(bytes, view, !isUpright, !keepsTransparency);
  const bitmap = await createImageBitmap(new Blob(parts, { type: file.type }), options);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  if (isOpaque) // what the frame does not reach
    for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 0) data.set(frame.colour, at);
  return { data, width, height, channels: 4, hasPalette: frame ? !isRamp(frame.palette, 3) : hasPalette(name, view) };
}

// The parts of a file of JPEG or PNG that are to be read. Browsers turn pictures by EXIF whatever `imageOrientation`
// asks for, and lose the colours under transparency.
function kept(bytes, view, cutsExif, cutsTransparency) {
  const parts = [];
  let done = 0;
  const cut = (start, end) => {
    parts.push(bytes.subarray(done, start));
    done = end;
  };
  const begin = view.byteLength < 16 ? 0 : view.getUint32(0);
  if (begin >>> 16 === 0xffd8)
    for (let at = 2, end; at + 4 <= view.byteLength && view.getUint8(at) === 0xff; at = end) {
      const marker = view.getUint8(at + 1);
      if (marker === 0xda) break; // the picture itself
      end = marker === 0xff ? at + 1 : at + 2 + view.getUint16(at + 2);
      if (marker === 0xe1 && cutsExif) cut(at, end);
    }
  if (begin === 0x89504e47)
    for (let at = 8, end; at + 12 <= view.byteLength; at = end) {
      end = at + 12 + view.getUint32(at);
      const isCut = { 0x65584966: cutsExif, 0x74524e53: cutsTransparency }[view.getUint32(at + 4)]; // eXIf, tRNS
      if (isCut) cut(at, end);
    }
  return [...parts, bytes.subarray(done)];
}

// Of a GIF: where the flags of its transparency are (0: it has none), the palette, and the colour that Pillow gives to
// what the first frame leaves out of the screen.
function firstFrame(bytes) {
  const table = (flags, at) => bytes.subarray(at, at + (flags & 0x80 ? 3 * 2 ** ((flags & 7) + 1) : 0));
  let palette = table(bytes[10], 13), at = 13 + palette.length, flagsAt = 0, index = 0;
  for (; at < bytes.length && bytes[at] !== 0x2c; at++) {
    if (bytes[at] !== 0x21) continue;
    if (bytes[at + 1] === 0xf9 && bytes[at + 3] & 1) [flagsAt, index] = [at + 3, bytes[at + 6]];
    for (at += 2; bytes[at]; at += bytes[at] + 1);
  }
  const own = table(bytes[at + 9], at + 10);
  palette = own.length ? own : palette;
  return { flagsAt, palette, colour: [0, 1, 2].map((c) => palette[3 * index + c] ?? 0).concat(255) };
}

// Pillow reads a palette of which each colour is the grey of its own number as no palette.
function isRamp(palette, step) {
  return palette.every((value, at) => at % step > 2 || value === Math.floor(at / step));
}

// Pillow resizes pictures with a palette, and those of one bit, by nearest neighbours.
function hasPalette(name, view) {
  if (name.startsWith("BM")) {
    const size = view.getUint32(14, true), isOld = size === 12, bits = view.getUint16(isOld ? 24 : 28, true);
    if (bits > 8) return false;
    const count = (isOld ? 0 : view.getUint32(46, true)) || 2 ** bits, step = isOld ? 3 : 4;
    return count === 2 || !isRamp(new Uint8Array(view.buffer, 14 + size, count * step), step);
  }
  const [depth, type] = name.startsWith("\x89PNG") ? [view.getUint8(24), view.getUint8(25)] : [];
  return type === 3 || (type === 0 && depth === 1);
}

// Canvases keep colours multiplied by alpha, so that those below half of it come back wrong by more than a level. Only
// a picture whose colours are multiplied anyway, to be resized or laid on white, loses nothing.
function refuseLostColours({ data, width, height }) {
  for (let at = 3; at < data.length; at += 4)
    if (data[at] < 128)
      throw new Error(
        `this picture of ${width} × ${height} pixels is partly transparent and is not resized, so the model sees the ` +
        "colours under its transparency, which browsers do not give; save it without transparency, or in another size");
}

// (3, R, R) float32, normalised.
export function toInput(image, facts) {
  const R = facts.size, isHf = facts.style === "hf", side = facts.resize_size;
  image = isHf ? onWhite(image) : image;
  let { width: W, height: H } = image;
  const short = Math.min(W, H), long = Math.max(W, H);
  if (facts.resize === "shortest" && side * side * long > facts.most_pixels * short) {
    const cut = Math.floor((long - 8 * short) / 2);
    image = W > H ? crop(image, cut, 0, W - 2 * cut, H) : crop(image, 0, cut, W, H - 2 * cut);
    [W, H] = [image.width, image.height];
  }
  let size = [W, H];
  if (facts.resize === "squash") size = [side, side];
  if (facts.resize === "shortest") {
    const other = Math.trunc((side * Math.max(W, H)) / Math.min(W, H));
    size = W <= H ? [side, other] : [other, side];
  }
  const filter = image.hasPalette && !isHf ? "nearest" : facts.interpolation;
  const isResized = size[0] !== W || size[1] !== H;
  if (!isHf && !(isResized && filter !== "nearest")) refuseLostColours(image);
  if (isResized) {
    image = filter === "nearest" ? resize(image, ...size, filter) : divided(resize(multiplied(image), ...size, filter));
  }
  const place = isHf ? (gap) => Math.floor(gap / 2) : (gap) => roundHalfToEven(gap / 2);
  const { data } = crop(image, place(image.width - R), place(image.height - R), R, R);
  const out = new Float32Array(3 * R * R);
  for (let c = 0; c < 3; c++)
    for (let at = 0; at < R * R; at++)
      out[c * R * R + at] = (data[4 * at + c] / 255 - facts.mean[c]) / facts.std[c];
  return out;
}

function roundHalfToEven(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2 === 0 ? 0 : 1) : Math.round(x);
}

// What lies outside is black.
function crop({ data, width, height, hasPalette }, left, top, newWidth, newHeight) {
  const out = new Uint8ClampedArray(newWidth * newHeight * 4);
  for (let y = 0; y < newHeight; y++)
    for (let x = 0; x < newWidth; x++) {
      const [fromX, fromY] = [x + left, y + top];
      if (fromX < 0 || fromY < 0 || fromX >= width || fromY >= height) continue;
      const at = 4 * (fromY * width + fromX);
      out.set(data.subarray(at, at + 4), 4 * (y * newWidth + x));
    }
  return { data: out, width: newWidth, height: newHeight, channels: 4, hasPalette };
}

function eachPixel(image, change) {
  const data = new Uint8ClampedArray(image.data);
  for (let at = 0; at < data.length; at += 4)
    for (let c = 0; c < 3; c++) data[at + c] = change(data[at + c], data[at + 3]);
  return { ...image, data };
}

function multiplied(image) {
  return eachPixel(image, (value, alpha) => {
    const product = value * alpha + 128;
    return ((product >> 8) + product) >> 8;
  });
}

function divided(image) {
  return eachPixel(image, (value, alpha) => (alpha === 0 || alpha === 255 ? value : Math.trunc((255 * value) / alpha)));
}

function onWhite(image) {
  const laid = eachPixel(image, (value, alpha) => Math.round((value * alpha + 255 * (255 - alpha)) / 255));
  for (let at = 3; at < laid.data.length; at += 4) laid.data[at] = 255;
  return laid;
}
