"""Real ComfyUIs for tests and demos: trees, servers, pages, and one inside this process."""
