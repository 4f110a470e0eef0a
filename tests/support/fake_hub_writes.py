"""The hub's write API, as huggingface_hub calls it: who am I, repos, LFS objects, commits."""

import base64
import json
import re
from hashlib import sha1, sha256
from urllib.parse import unquote

from fake_xet import Xet

LARGE = (".safetensors",)


class Writes(Xet):
    """Answer POST and PUT; mixed into the handler of `fake_hub.FakeHub`."""

    def do_POST(self) -> None:
        self.write()

    def do_PUT(self) -> None:
        self.write()

    def write(self) -> None:
        hub = self.server_hub
        path, _, query = self.path.partition("?")
        body = self.read_body()
        if self.refuse(path, body):
            return
        if path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer_json({"warnings": [], "errors": []})
        elif match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            self.preupload(match[1], unquote(match[2]), json.loads(body)["files"])
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})(?:/(\d+))?", path):
            if self.command == "PUT":
                hub.stored.append(match[1])
                hub.parts.setdefault(match[1], {})[int(match[2] or 1)] = body
            if self.command == "POST" or not match[2]:
                parts = hub.parts.pop(match[1])
                hub.objects[match[1]] = b"".join(parts[n] for n in sorted(parts))
            self.answer(200, headers={"Content-Length": "0", "ETag": '"part"'})
        elif path.startswith("/cas/"):
            self.xet_write(path, body)
        elif path == "/verify":
            content = hub.objects.get(json.loads(body)["oid"], b"")
            same = sha256(content).hexdigest() == json.loads(body)["oid"]
            self.answer(200 if same else 400)
        elif match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            self.commit(match[1], unquote(match[2]), body, create_pr="create_pr" in query)
        elif match := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            self.branch(match[1], unquote(match[2]))
        elif match := re.fullmatch(r"/api/models/(.+?)/discussions", path):
            self.branch(match[1], "refs/pr/1", json.loads(body)["title"])
        else:
            self.answer(404)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def whoami(self) -> None:
        token = {"displayName": "t", "role": self.server_hub.role}
        auth = {"type": "access_token", "accessToken": token}
        self.answer_json({"type": "user", "name": "user", "orgs": [], "auth": auth})

    def create_repo(self, wanted: dict) -> None:
        hub = self.server_hub
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = {"url": f"{hub.endpoint}/{repo}"}
        if repo in hub.repos:
            self.answer_json(url, status=409)
            return
        hub.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            hub.private.add(repo)
        self.answer_json(url)

    def preupload(self, repo: str, revision: str, files: list[dict]) -> None:
        there = self.server_hub.files(repo, revision) or {}
        self.answer_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": object_id(file["path"], there.get(file["path"])),
                    }
                    for file in files
                ]
            }
        )

    def batch(self, wanted: list[dict]) -> None:
        hub = self.server_hub
        objects = []
        for found in wanted:
            if found["oid"] in hub.objects:
                objects.append(found)
                continue
            upload = {"href": f"{hub.endpoint}/storage/{found['oid']}"}
            if hub.chunk_size:
                count = -(-found["size"] // hub.chunk_size)
                urls = {str(n): f"{upload['href']}/{n}" for n in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(hub.chunk_size), **urls}
            actions = {"upload": upload, "verify": {"href": f"{hub.endpoint}/verify"}}
            objects.append({**found, "actions": actions})
        self.answer_json({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str, body: bytes, *, create_pr: bool) -> None:
        hub = self.server_hub
        if create_pr:
            hub.repos[f"{repo}@refs/pr/1"] = dict(hub.repos[repo])
            revision = "refs/pr/1"
        files = hub.files(repo, revision)
        header, *lines = (json.loads(line) for line in body.splitlines())
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        hub.commits.append((repo, revision, header["value"]["summary"]))
        url = f"{hub.endpoint}/{repo}"
        found = {"commitUrl": f"{url}/commit/{'ab' * 20}", "commitOid": "ab" * 20}
        self.answer_json({**found, "pullRequestUrl": f"{url}/discussions/1"})

    def branch(self, repo: str, name: str, title: str = "") -> None:
        hub = self.server_hub
        key = f"{repo}@{name}"
        if key in hub.repos:
            self.answer_json({"error": "it exists"}, status=409)
            return
        hub.repos[key] = dict(hub.repos[repo])
        hub.titles.append(title)
        self.answer_json({"num": 1})

    def discussion(self, repo: str) -> None:
        event = {
            "id": "1",
            "type": "comment",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "author": {"name": "user"},
            "data": {
                "edited": False,
                "hidden": False,
                "latest": {
                    "raw": "",
                    "html": "",
                    "updatedAt": "2026-01-01T00:00:00.000Z",
                    "author": {"name": "user"},
                },
            },
        }
        self.answer_json(
            {
                "title": self.server_hub.titles[-1],
                "num": 1,
                "repo": {"name": repo, "type": "model"},
                "author": {"name": "user"},
                "isPullRequest": True,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "draft",
                "events": [event],
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "mergeCommitId": None,
                "diff": "",
            }
        )


def object_id(name: str, content: bytes | None) -> str | None:
    """Return the name that git or LFS gives to a content."""
    if content is None:
        return None
    if name.endswith(LARGE):
        return sha256(content).hexdigest()
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()
