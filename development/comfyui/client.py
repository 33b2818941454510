"""What a program asks of a ComfyUI server: run a prompt, follow it, look at what it made."""

import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import websocket

from .. import DevelopmentError

Json = dict[str, Any]


class PromptRefused(DevelopmentError):
    """The server found the prompt invalid; `answer` is what it said."""

    def __init__(self, answer: Json):
        self.answer = answer
        reasons = [str(answer.get("error", {}).get("message", answer))]
        for node, errors in answer.get("node_errors", {}).items():
            for error in errors["errors"]:
                detail = f"{error['message']} {error['details']}"
                reasons.append(f"{errors['class_type']} ({node}): {detail}")
        super().__init__("ComfyUI refused the prompt: " + "; ".join(reasons))


class PromptFailed(DevelopmentError):
    """A node raised, or the run was interrupted; `event` and `detail` say which."""

    def __init__(self, event: str, detail: Json):
        self.event, self.detail = event, detail
        what = detail.get("exception_message", event)
        trace = "".join(detail.get("traceback") or [])
        where = detail.get("node_type")
        super().__init__(f"The run stopped in {where}: {what.strip()}\n{trace}".rstrip())


class Client:
    """Talks to the server at `address` ("127.0.0.1:8188") under a client id of its own."""

    def __init__(self, address: str):
        self.address, self.client_id = address, uuid.uuid4().hex

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def answers(self) -> bool:
        try:
            self.get("/system_stats")
        except (OSError, ValueError):
            return False
        return True

    def get(self, path: str, **query: str) -> Any:
        return json.loads(self.fetch(path, **query))

    def fetch(self, path: str, **query: str) -> bytes:
        parts = f"?{urllib.parse.urlencode(query)}" if query else ""
        with _open(f"{self.url}{path}{parts}") as answer:
            return answer.read()

    def post(self, path: str, body: Json) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with _open(urllib.request.Request(self.url + path, data, headers)) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> Json:
        return self.get("/object_info")

    def view(self, image: Json) -> bytes:
        """The file behind an entry of a history's outputs."""
        return self.fetch("/view", **{key: image[key] for key in ("filename", "subfolder", "type")})

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def submit(self, prompt: Json) -> str:
        """Queue a prompt in API format → its id. Raises PromptRefused."""
        try:
            body = {"prompt": prompt, "client_id": self.client_id}
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptRefused(json.loads(error.read())) from error

    def queue(
        self,
        prompt: Json,
        on_event: Callable[[str, Json], None] = lambda event, detail: None,
        timeout: float = 600,
    ) -> Json:
        """Run a prompt in API format to its end → its entry of the server's history.

        `on_event` gets every message about it as it arrives ("executing", "progress", …). Raises
        PromptRefused, PromptFailed, and TimeoutError after `timeout` seconds without a message.
        """
        with self.events(timeout) as events:
            prompt_id = self.submit(prompt)
            failure = None
            for event, detail in events:
                if detail.get("prompt_id") != prompt_id:
                    continue
                on_event(event, detail)
                if event in ("execution_error", "execution_interrupted"):
                    failure = PromptFailed(event, detail)
                # Success is announced earlier, but only now is the history written.
                if event == "executing" and detail["node"] is None:
                    break
        if failure:
            raise failure
        return self.history(prompt_id)

    def history(self, prompt_id: str) -> Json:
        return self.get(f"/history/{prompt_id}")[prompt_id]

    @contextlib.contextmanager
    def events(self, timeout: float = 600) -> Iterator[Iterator[tuple[str, Json]]]:
        """The server's messages to this client, (type, data) each, from now on."""
        address = f"ws://{self.address}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(address, timeout=timeout)
        try:
            yield _messages(connection)
        finally:
            connection.close()


def _messages(connection: websocket.WebSocket) -> Iterator[tuple[str, Json]]:
    while True:
        try:
            message = connection.recv()
        except websocket.WebSocketTimeoutException as error:
            raise TimeoutError("The server has sent nothing for too long.") from error
        except (websocket.WebSocketException, OSError) as error:
            raise DevelopmentError("ComfyUI ended in the middle of a run.") from error
        # Previews come as binary frames.
        if isinstance(message, str) and message:
            content = json.loads(message)
            yield content["type"], content["data"]


def _open(request: str | urllib.request.Request):
    # The server is on this machine: a proxy from the environment must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=30)
