"""A server that speaks the routes of vLLM that Lossmith asks, over a tiny model, with faults to be planted."""

import contextlib
import copy
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load_file

import tiny
from lossmith.policy import SamplingSettings, sample
from lossmith.prompts import load_prompts

DEAD = "engine is dead"  # the server itself is there
SLOW = {"hangs": 1.5, "slow": 0.3}  # seconds before an answer


class FakeVllm:
    """`with FakeVllm() as server: server.url`. fault: what goes wrong, by name; it may be set at any time."""

    def __init__(self, policy=None, fault="", checker=True, port=0):
        self.policy, self.fault, self.checker = policy or tiny.loaded(), fault, checker
        self.policy.model.load_state_dict(copy.deepcopy(self.policy.model.state_dict()))
        self.version, self.pushes, self.salts, self.requests = "default", 0, set(), []
        self._lock, self._closed = threading.Lock(), False
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed = True
        self._http.shutdown()
        with self._lock:  # what is being written would meet the next test's model: attention is hooked for the process
            self._http.server_close()

    def _handler(fake):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null"))

            def answer(self, body):
                path = self.path.split("?")[0]
                if fake.fault == "dies" and path.endswith("generate"):
                    self.close_connection = True
                    return None
                if fake.fault in SLOW and path.endswith("generate"):
                    time.sleep(SLOW[fake.fault])
                route = getattr(fake, path.strip("/").replace("/", "_"), None)
                if route is None or (path == "/weight_checker" and not fake.checker):
                    return self.send_error(404)
                try:
                    data = json.dumps(route(body)).encode()
                except Exception as error:  # as a server does: whatever went wrong is a 500
                    return self.send_error(500, str(error).splitlines()[0][:80])
                if fake.fault == "garbage" and path.endswith("generate"):
                    data = b"<html>busy</html>"
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fake.fault == "drips" and path.endswith("generate"):
                    return self.drip(data)
                self.wfile.write(data)

            def drip(self, data):
                """Byte by byte: no read of it ever waits for long."""
                with contextlib.suppress(OSError):
                    for k in range(len(data)):
                        self.wfile.write(data[k : k + 1])
                        time.sleep(0.05)

        return Handler

    # -- routes -------------------------------------------------------------------------------------------------------

    def server_info(self, _):
        kind = "bfloat16" if self.fault == "bfloat16" else "float32"
        mode = "raw_logprobs" if self.fault == "raw" else "processed_logprobs"
        return {
            "vllm_config": {
                "model_config": {"dtype": "torch." + kind, "logprobs_mode": mode},
                "device_config": {"device_type": "cpu"},
                "scheduler_config": {"enable_chunked_prefill": self.fault == "chunks"},
            }
        }

    def tokenize(self, body):
        ids = self.policy.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return {"tokens": [i + 1 for i in ids] if self.fault == "tokenizer" else ids}

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights" and body["kwargs"]["is_checkpoint_format"] is True
        self.pushes += 1
        if self.fault == "drops" or (self.fault == "drops later" and self.pushes > 2):
            return {"results": [None]}
        state = load_file(body["kwargs"]["weights_path"] + "/model.safetensors")
        own = dict(self.policy.model.named_parameters(remove_duplicate=False))
        if self.fault == "partial":
            state = {k: v for k, v in state.items() if ".1." not in k}
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)
        return {"results": [None]}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return {"success": True}

    def weight_checker(self, _):
        tensors = dict(self.policy.model.named_parameters())
        return {
            "checksums": {
                "dp0:tp0:" + k: hashlib.sha256(v.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
                for k, v in tensors.items()
            }
        }

    def inference_v1_generate(self, body):
        assert self.fault != DEAD
        wished = body["sampling_params"]
        self.salts.add(body["cache_salt"])
        settings = SamplingSettings(
            wished["temperature"], wished["top_p"], max(wished["top_k"], 0), wished["max_tokens"], tuple(wished["stop"])
        )
        (prompt,) = load_prompts(["x"])
        with self._lock:
            if self._closed:
                raise ConnectionError("the server is closed")
            self.requests.append(wished["seed"])
            self.policy._encoded[prompt.id] = tuple(body["token_ids"])
            (rollout,) = sample(self.policy, [prompt], 1, settings, seed=wished["seed"])
        ids, logp = list(rollout.completion_ids), rollout.behavior_logp.values.tolist()
        if self.fault == "vocabulary":
            ids = [i + 10_000 for i in ids]
        if self.fault == "logprobs":
            logp = logp[:-1]
        if self.fault == "noise":
            logp = [x - 0.5 for x in logp]
        version = "old" if self.fault == "stale" else self.version
        choice = {
            "index": 0, "token_ids": ids, "finish_reason": "length" if rollout.truncated else "stop",
            "stop_reason": settings.stop[0] if rollout.finish_reason == "stop" else None,
            "logprobs": {"content": [{"token_id": i, "logprob": x} for i, x in zip(ids, logp, strict=False)]},
            "weight_versions": [{"start": 0, "end": len(ids), "version": version}],
        }  # fmt: skip
        return {"choices": [choice]}
