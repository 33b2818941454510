import json, time
import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.comfyui.browser import in_page, load_workflow, open_page
HIDE = """
for (const q of ['.comfyui-menu', '.side-tool-bar-container', '.graph-canvas-menu', '[class*=minimap]', '.p-toast', '.actionbar', '.workflow-tabs-container'])
  for (const e of document.querySelectorAll(q)) e.style.visibility = 'hidden';
app.canvas.show_info = false; app.canvas.setDirty(true, true); return 1"""
def test_shot(browser, server):
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    browser.set_window_size(1600, 1087)
    for path in sorted((ROOT / "workflows").glob("[2347]*.json")):
        load_workflow(browser, json.loads(path.read_text()))
        if path.stem[0] == "7":
            t = time.time()
            answer = in_page(browser, "app.queuePrompt(0); return 1")
            while time.time() - t < 900:
                time.sleep(5)
                h = server.get("/history")
                if h and all(e["status"]["completed"] or e["status"]["status_str"] == "error" for e in h.values()) and not server.get("/queue")["queue_running"]:
                    break
            print("took", time.time() - t, [e["status"]["status_str"] for e in h.values()])
        time.sleep(2)
        in_page(browser, HIDE)
        time.sleep(1)
        browser.save_screenshot(f"/tmp/shots/{path.stem}.png")
