// The interactive view of "Locality of Self-Attention": click a point, see what it looks at.
// A DOM widget, so that it is the same in the canvas and in the Vue node renderer.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "DeltaConvLocality";
const SIDE = 120;
const HINT = "Run the node, then click the picture: every size of map shows what that point looks at.";

/** Where a node's last view is kept: for this tab of the browser, and in no saved workflow. */
const key = (node) => `deltaconv.view.${node.graph?.id ?? ""}.${node.id}`;

const STYLE = `
.deltaconv-view { display: flex; flex-direction: column; gap: 6px; padding: 6px; overflow: auto;
  box-sizing: border-box; width: 100%; height: 100%; font: 12px sans-serif;
  color: var(--fg-color, #ddd); }
.deltaconv-view .maps { display: flex; flex-wrap: wrap; gap: 8px; }
.deltaconv-view figure { margin: 0; }
.deltaconv-view canvas { display: block; border-radius: 3px; image-rendering: pixelated; }
.deltaconv-view canvas.pick { cursor: crosshair; }
.deltaconv-view canvas.pick:focus-visible { outline: 2px solid #D55E00; }
.deltaconv-view .bar { display: flex; gap: 10px; align-items: center; }
.deltaconv-view button { cursor: pointer; }
`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function picture({ filename, subfolder, type }) {
  const image = new Image();
  const query = new URLSearchParams({ filename, subfolder, type });
  image.src = api.apiURL(`/view?${query}`);
  await image.decode();
  return image;
}

/** Canvas of a map's proportions, SIDE wide or high, with a caption. */
function panel(parent, height, width, caption, className) {
  const scale = SIDE / Math.max(height, width);
  const canvas = element("canvas", {
    width: Math.round(width * scale), height: Math.round(height * scale), className,
  });
  parent.append(element("figure", {}, canvas, element("figcaption", { textContent: caption })));
  return canvas;
}

function ring(canvas, x, y) {
  const context = canvas.getContext("2d");
  for (const [color, lineWidth] of [["#fff", 4], ["#D55E00", 2]]) {
    context.beginPath();
    context.arc(x * canvas.width, y * canvas.height, 6, 0, 2 * Math.PI);
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.stroke();
  }
}

class LocalityView {
  constructor(node) {
    this.node = node;
    this.point = [0.5, 0.5];
    this.root = element("div", { className: "deltaconv-view" }, HINT);
    // The page's canvas would otherwise take the click as the start of a drag.
    for (const event of ["pointerdown", "wheel"]) {
      this.root.addEventListener(event, (e) => e.stopPropagation());
    }
  }

  /** Show what a run before a reload or a switch of tabs gave, while ComfyUI still has its files. */
  restore() {
    const kept = sessionStorage.getItem(key(this.node));
    if (kept) this.show(JSON.parse(kept)).catch(() => this.root.replaceChildren(HINT));
  }

  async show(view) {
    this.view = view;
    const [seen, ...atlases] = await Promise.all(
      [picture(view.picture), ...view.maps.map((map) => picture(map.file))]);
    if (this.view !== view) return;
    Object.assign(this, { seen, atlases });
    const maps = element("div", { className: "maps" });
    const at = `${Math.round(100 * view.percent)}% of sampling`;
    this.picker = panel(maps, seen.height, seen.width, `click here: ${at}`, "pick");
    this.picker.tabIndex = 0;
    this.picker.addEventListener("click", (event) => {
      const box = this.picker.getBoundingClientRect();
      this.pick((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
    this.picker.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (!(event.key in step)) return;
      event.preventDefault();
      event.stopPropagation();
      const [dx, dy] = step[event.key];
      this.pick(this.point[0] + dx / view.points, this.point[1] + dy / view.points);
    });
    this.canvases = view.maps.map((map) => {
      const layers = map.layers === 1 ? "1 layer" : `${map.layers} layers`;
      return panel(maps, map.height, map.width, `${map.width}×${map.height}, ${layers}`, "map");
    });
    this.label = element("span");
    const add = element("button", { textContent: "Add to points" });
    add.addEventListener("click", () => this.add());
    const scale = element("span", {
      textContent: `Colors from ${view.low}× (dark) to ${view.high}× (bright) of uniform attention.`,
    });
    const bar = element("div", { className: "bar" }, this.label, add);
    this.root.replaceChildren(bar, maps, scale);
    this.pick(...this.point);
  }

  pick(x, y) {
    const { points } = this.view;
    // The nearest query point that was measured.
    const cell = [x, y].map((v) => Math.min(points - 1, Math.max(0, Math.floor(v * points))));
    this.point = cell.map((index) => (index + 0.5) / points);
    this.label.textContent = `Query at (${this.point.map((v) => v.toFixed(2)).join(", ")})`;
    const draw = (canvas, ...source) => {
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(...source, 0, 0, canvas.width, canvas.height);
      ring(canvas, ...this.point);
    };
    draw(this.picker, this.seen, 0, 0, this.seen.width, this.seen.height);
    this.view.maps.forEach((map, index) => {
      const [w, h] = [map.cell_width, map.cell_height];
      draw(this.canvases[index], this.atlases[index], cell[0] * w, cell[1] * h, w, h);
    });
  }

  add() {
    const widget = this.node.widgets?.find((each) => each.name === "points");
    if (!widget) return;
    const line = this.point.map((v) => v.toFixed(3)).join(", ");
    const lines = String(widget.value ?? "").split("\n").filter((each) => each.trim());
    if (!lines.includes(line)) lines.push(line);
    widget.value = lines.join("\n");
    widget.callback?.(widget.value);
    this.node.graph?.setDirtyCanvas(true, true);
  }
}

app.registerExtension({
  name: "deltaconv.locality",
  setup() {
    document.head.append(element("style", { textContent: STYLE }));
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const view = new LocalityView(node);
    const widget = node.addDOMWidget("attention_view", "deltaconv_locality", view.root, {
      serialize: false,
      getMinHeight: () => 300,
      hideOnZoom: false,
    });
    // Neither in prompts (above) nor in saved workflows.
    widget.serialize = false;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      const message = output?.deltaconv_locality?.[0];
      if (!message) return;
      sessionStorage.setItem(key(node), JSON.stringify(message));
      view.show(message).catch((error) => console.error("deltaconv:", error));
    };
    node.deltaconvView = view;
  },
  loadedGraphNode(node) {
    node.deltaconvView?.restore();
  },
});
