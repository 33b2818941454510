// Colors of the pack's own sockets and links, for the canvas and the Vue node renderer.
import { app } from "../../scripts/app.js";

const COLORS = {
  DELTACONV: "#2ec4a0",
  DELTACONV_LOCALITY: "#9ccc65",
  DELTACONV_RECIPE: "#c9935f",
  DELTACONV_DISTILL_SETTINGS: "#90a4d4",
};

/** Let `colors` have ours wherever it is given none: a palette empties those it does not name. */
function fill(colors) {
  for (const [type, color] of Object.entries(COLORS)) {
    let given = colors[type];
    Object.defineProperty(colors, type, {
      get: () => given || color,
      set: (value) => { given = value; },
      enumerable: true,
      configurable: true,
    });
  }
}

app.registerExtension({
  name: "deltaconv.colors",
  setup() {
    fill(app.canvas.default_connection_color_byType);
    fill(LGraphCanvas.link_type_colors);
    // A palette sets and removes these on the element itself, which wins over a style sheet.
    const lines = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
    const style = document.createElement("style");
    style.textContent = `:root { ${lines.join(" ")} }`;
    document.head.append(style);
  },
});
