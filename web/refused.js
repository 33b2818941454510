// Why a node of ours refused its inputs, on the node itself: the page marks the node, and keeps the
// sentence behind a sign in a list, or in the server's log.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const OURS = /^DeltaConv/;
const LINE = "$$node-text-preview";
// The page takes a node's text for HTML or Markdown; names of files come from strangers.
const MARKUP = /[&<>[\]*_`~\\]/g;
const asText = (text) => text.replace(MARKUP, (each) => `&#${each.charCodeAt(0)};`);

/** Node id → our sentence, of those that the server did not take. */
function refusals(errors) {
  const found = new Map();
  for (const [id, { class_type, errors: reasons }] of Object.entries(errors ?? {})) {
    if (!OURS.test(class_type)) continue;
    const of = (type) => reasons.filter((reason) => reason.type === type).map(({ details }) => details);
    // "input - sentence"
    const said = of("custom_validation_failed").map((each) => each.replace(/^\w+ - /, ""));
    const open = of("required_input_missing");
    if (open.length) {
      const order = app.graph.getNodeById(id)?.inputs?.map(({ name }) => name) ?? [];
      open.sort((one, other) => order.indexOf(one) - order.indexOf(other));
      said.push(`Expected ${open.join(" and ")} to be connected, got nothing.`);
    }
    if (said.length) found.set(id, said.join(" "));
  }
  return found;
}

let shown = new Map();

function show(errors) {
  const now = refusals(errors);
  for (const [id, text] of shown) {
    const node = app.graph.getNodeById(id);
    const index = node?.widgets?.findIndex((each) => each.name === LINE) ?? -1;
    if (now.has(id) || index < 0 || node.widgets[index].value !== text) continue;
    node.widgets[index].onRemove?.();
    node.widgets.splice(index, 1);
  }
  shown = new Map();
  for (const [nodeId, reason] of now) {
    const text = asText(reason);
    api.dispatchCustomEvent("progress_text", { nodeId, text });
    shown.set(nodeId, text);
  }
}

app.registerExtension({
  name: "deltaconv.refused",
  setup() {
    const queue = app.queuePrompt;
    app.queuePrompt = async function (...given) {
      const queued = await queue.apply(this, given);
      show(app.lastNodeErrors);
      return queued;
    };
  },
});
