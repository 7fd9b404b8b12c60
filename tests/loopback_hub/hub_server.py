"""A small Hugging Face Hub on loopback, for tests: the real client, real HTTP, no internet.

In a test:   hub = HubServer(folder).start(); os.environ["HF_ENDPOINT"] = hub.url   (before huggingface_hub is imported)
On its own:  python -m tests.loopback_hub.hub_server FOLDER 8000

Large and binary files take the LFS path (the client needs HF_HUB_DISABLE_XET=1: Xet is not spoken) and are served, as
by the Hub, through a 302 to another origin (a second port), to which the client must not send its token.
hub.fault(...) and hub.log: see loopback.Faults.  Blobs are files FOLDER/<sha256>; the rest is in memory.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs

import yaml  # a dependency of huggingface_hub itself

from tests.loopback_hub.loopback import Faults, Handler, HTTPError, Server

LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".onnx",
    ".npz",
    ".npy",
    ".parquet",
    ".arrow",
    ".zip",
    ".gz",
)
LFS_SIZE = 10_000_000
TOKENS = {
    "hf_owner": {"name": "alice", "orgs": ["acme"], "role": "write"},
    "hf_reader": {"name": "alice", "orgs": ["acme"], "role": "read"},
    "hf_other": {"name": "mallory", "orgs": [], "role": "write"},
}


def hub_error(status: int, code: str | None, message: str, **headers: str) -> HTTPError:
    return HTTPError(status, message, **headers, **({"X-Error-Code": code} if code else {}))


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def front_matter(text: str):
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.S)
    return yaml.safe_load(match[1]) if match else None


class HubServer(Faults):
    """Repositories, by "models/org/name": settings, refs (name to commit), commits (each with its tree, by path)."""

    def __init__(self, folder, port: int = 0, tokens: dict | None = None):
        super().__init__()
        self.folder, self.tokens, self.secret = Path(folder), tokens or TOKENS, secrets.token_hex(16)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, dict] = {}
        self.http, self.cdn = Server(HubHandler, self, port), Server(HubHandler, self)
        self.url = self.http.url

    def start(self) -> HubServer:
        for server in (self.http, self.cdn):
            server.start()
        return self

    def stop(self) -> None:
        for server in (self.http, self.cdn):
            server.stop()

    def blob(self, sha256: str) -> Path:
        return self.folder / sha256

    def add_file(self, data: bytes) -> dict:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blob(sha256).write_bytes(data)
        return {"oid": git_oid(data), "size": len(data), "sha256": sha256, "lfs": None}

    def add_lfs(self, sha256: str) -> dict:
        size = self.blob(sha256).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {
            "oid": git_oid(text),
            "size": size,
            "sha256": sha256,
            "lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(text)},
        }

    def sign(self, what: str) -> str:
        return hashlib.sha256((self.secret + what).encode()).hexdigest()[:16]

    def commit(self, repo: dict, ref: str, tree: dict, title: str, message: str, author: str) -> str:
        sha, date = secrets.token_hex(20), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        repo["commits"][sha] = {
            "parent": repo["refs"].get(ref),
            "tree": tree,
            "title": title,
            "message": message,
            "date": date,
            "author": author,
        }
        repo["refs"][ref] = sha
        return sha


class HubHandler(Handler):
    REPO, GIT, REV = (
        r"/api/(models|datasets|spaces)/([^/]+/[^/]+)",
        r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)",
        r"/([^/]+)",
    )
    ROUTES = [
        (methods, re.compile(path), name)
        for methods, path, name in [
            ("GET", "/api/whoami-v2", "whoami"),
            ("POST", "/api/validate-yaml", "validate_yaml"),
            ("POST", "/api/repos/create", "create_repo"),
            ("DELETE", "/api/repos/delete", "delete_repo"),
            ("GET", REPO + "(?:/revision/([^/]+))?", "info"),
            ("PUT", REPO + "/settings", "settings"),
            ("GET", REPO + "/auth-check(/write)?", "auth_check"),
            ("GET", REPO + "/refs", "refs"),
            ("GET", REPO + "/tree" + REV + "(?:/(.+))?", "tree"),
            ("POST", REPO + "/paths-info" + REV, "paths_info"),
            ("POST DELETE", REPO + "/(branch|tag)" + REV, "ref"),
            ("POST", REPO + "/preupload" + REV, "preupload"),
            ("POST", REPO + "/commit" + REV, "post_commit"),
            ("POST", GIT + r"\.git/info/lfs/objects/batch", "lfs_batch"),
            ("PUT POST", "/_lfs/([0-9a-f]{64})(/verify)?", "lfs_object"),
            ("GET HEAD", GIT + "/resolve" + REV + "/(.+)", "resolve"),
            ("GET HEAD", "/_cdn/([0-9a-f]{64})", "cdn"),
        ]
    ]

    hub = property(lambda self: self.server.owner)

    # ------------------------------------------------------------------ who may do what
    def user(self, needed: bool = False) -> dict | None:
        header = self.headers.get("Authorization")
        if header is None:
            if needed:
                raise hub_error(401, None, "Invalid username or password.")
            return None
        if (user := self.hub.tokens.get(header.removeprefix("Bearer "))) is None:
            raise hub_error(401, None, "Invalid credentials in Authorization header")
        return user

    def writer(self, namespace: str) -> dict:
        user = self.user(needed=True)
        if user["role"] != "write" or namespace not in [user["name"], *user["orgs"]]:
            raise hub_error(403, None, f"You don't have the rights to write under the namespace {namespace!r}")
        return user

    def repo(self, kind: str | None, repo_id: str, write: bool = False, files: bool = False) -> dict:
        user, repo, namespace = self.user(), self.hub.repos.get(f"{kind or 'models'}/{repo_id}"), repo_id.split("/")[0]
        member = user is not None and namespace in [user["name"], *user["orgs"]]
        if repo is None or (
            repo["private"] and not member
        ):  # with the code: only of https does the client take a bare 401 for this
            raise hub_error(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo["gated"] and not member and (user is None or user["name"] not in repo["granted"]):
            raise hub_error(
                403 if user else 401,
                "GatedRepo",
                f"Access to {repo_id} is restricted and you are not in the authorized list.",
            )
        if write:
            self.writer(namespace)
        return repo

    def sha(self, repo: dict, revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in repo["refs"]:
                return repo["refs"][name]
        for sha in repo["commits"]:
            if len(revision) >= 7 and sha.startswith(revision):
                return sha
        raise hub_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # ------------------------------------------------------------------ accounts, repositories, refs
    def whoami(self):
        user = self.user(needed=True)
        self.reply(
            {
                "type": "user",
                "name": user["name"],
                "orgs": [{"name": org} for org in user["orgs"]],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}},
            }
        )

    def validate_yaml(self):
        errors, warnings = [], []
        try:
            data = front_matter(self.json()["content"])
        except yaml.YAMLError as error:
            data, errors = {}, [f"YAML Metadata Error: {error}"]
        if data is None:
            warnings = ["empty or missing yaml metadata in repo card"]
        elif not isinstance(data, dict):
            errors = ['"metadata" must be of type object']
        else:
            errors += [
                f'"{key}" must be a string'
                for key in ("license", "pipeline_tag", "library_name")
                if not isinstance(data.get(key, ""), str)
            ]
        self.reply(
            {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]},
            400 if errors else 200,
        )

    def named(self) -> tuple[dict, str, str]:
        """The body of a request about a repository, its kind and its id."""
        body = self.json()
        return (
            body,
            body.get("type", "model") + "s",
            f"{body.get('organization') or self.user(needed=True)['name']}/{body['name']}",
        )

    def page(self, kind: str | None, repo_id: str) -> str:
        return f"{self.hub.url}/{'' if kind in (None, 'models') else kind + '/'}{repo_id}"

    def create_repo(self):
        body, kind, repo_id = self.named()
        user = self.writer(repo_id.split("/")[0])
        with self.hub.lock:
            if f"{kind}/{repo_id}" in self.hub.repos:
                return self.reply({"error": "You already created this repo", "url": self.page(kind, repo_id)}, 409)
            repo = {
                "id": repo_id,
                "private": body.get("visibility") == "private",
                "gated": False,
                "granted": [],
                "commits": {},
                "refs": {},
            }
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            self.hub.commit(
                repo,
                "refs/heads/main",
                {".gitattributes": self.hub.add_file(attributes.encode())},
                "initial commit",
                "",
                user["name"],
            )
            self.hub.repos[f"{kind}/{repo_id}"] = repo
        self.reply({"url": self.page(kind, repo_id), "name": repo_id})

    def delete_repo(self):
        _, kind, repo_id = self.named()
        self.repo(kind, repo_id, write=True)
        del self.hub.repos[f"{kind}/{repo_id}"]
        self.reply({})

    def settings(self, kind, repo_id):
        repo, body = self.repo(kind, repo_id, write=True), self.json()
        repo["gated"] = body.get("gated", repo["gated"])
        repo["private"] = body["visibility"] == "private" if "visibility" in body else repo["private"]
        self.reply({})

    def auth_check(self, kind, repo_id, write):
        self.repo(kind, repo_id, write=bool(write), files=True)
        self.reply({})

    def refs(self, kind, repo_id):
        refs, rows = self.repo(kind, repo_id)["refs"], {}
        for key, prefix in {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "converts": "refs/convert/",
            "pullRequests": "refs/pr/",
        }.items():
            rows[key] = [
                {"name": r.removeprefix(prefix), "ref": r, "targetCommit": sha}
                for r, sha in refs.items()
                if r.startswith(prefix)
            ]
        self.reply(rows)

    def ref(self, kind, repo_id, what, name):
        repo, body, prefix = (
            self.repo(kind, repo_id, write=True),
            self.json(),
            "refs/heads/" if what == "branch" else "refs/tags/",
        )
        with self.hub.lock:
            if self.command == "DELETE":
                if repo["refs"].pop(prefix + name, None) is None:
                    raise hub_error(404, "RevisionNotFound", f"Invalid rev id: {name}")
                return self.reply({})
            # the URL names the new branch; but for a tag it names the revision that is tagged
            new, start = (name, body.get("startingPoint") or "main") if what == "branch" else (body["tag"], name)
            if prefix + new in repo["refs"]:
                raise hub_error(409, None, f"Reference already exists: {new}")
            repo["refs"][prefix + new] = self.sha(repo, start)
        self.reply({})

    # ------------------------------------------------------------------ reading
    def info(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        sha = self.sha(repo, revision or "main")
        commit = repo["commits"][sha]
        siblings = [
            {
                "rfilename": p,
                **({"size": e["size"], "blobId": e["oid"], "lfs": e["lfs"]} if "blobs" in self.query else {}),
            }
            for p, e in commit["tree"].items()
        ]
        card = commit["tree"].get("README.md")
        card = (front_matter(self.hub.blob(card["sha256"]).read_text("utf-8")) if card else None) or {}
        self.reply(
            {
                "id": repo_id,
                "author": repo_id.split("/")[0],
                "sha": sha,
                "private": repo["private"],
                "gated": repo["gated"],
                "disabled": False,
                "createdAt": next(iter(repo["commits"].values()))["date"],
                "lastModified": commit["date"],
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags") or [],
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": siblings,
            }
        )

    def rows(self, repo, sha, wanted, expand):
        """Rows for those files and folders of a commit for which wanted(path) is true."""
        commit, rows = repo["commits"][sha], []
        for folder in sorted({"/".join(p.split("/")[:i]) for p in commit["tree"] for i in range(1, p.count("/") + 1)}):
            rows.append({"type": "directory", "path": folder, "oid": git_oid((sha + folder).encode()), "size": 0})
        for path, entry in sorted(commit["tree"].items()):
            rows.append(
                {
                    "type": "file",
                    "path": path,
                    "oid": entry["oid"],
                    "size": entry["size"],
                    **({"lfs": entry["lfs"]} if entry["lfs"] else {}),
                }
            )
        extra = {"lastCommit": {"id": sha, "title": commit["title"], "date": commit["date"]}} if expand else {}
        return [{**row, **extra} for row in rows if wanted(row["path"])]

    def tree(self, kind, repo_id, revision, path):
        repo = self.repo(kind, repo_id)
        sha, prefix = self.sha(repo, revision), f"{path}/" if path else ""
        recursive, expand = (self.query.get(key, ["false"])[0].lower() == "true" for key in ("recursive", "expand"))
        rows = self.rows(
            repo, sha, lambda p: p.startswith(prefix) and (recursive or "/" not in p[len(prefix) :]), expand
        )
        if path and not rows:
            raise hub_error(404, "EntryNotFound", f"{path} does not exist on {revision!r}", **{"X-Repo-Commit": sha})
        self.reply(rows)

    def paths_info(self, kind, repo_id, revision):
        repo, form = self.repo(kind, repo_id), parse_qs(self.body().decode())
        paths = {path.strip("/") for path in form.get("paths", [])}
        self.reply(self.rows(repo, self.sha(repo, revision), paths.__contains__, form.get("expand") == ["true"]))

    def resolve(self, kind, repo_id, revision, path):
        repo = self.repo(kind, repo_id, files=True)
        sha = self.sha(repo, revision)
        entry = repo["commits"][sha]["tree"].get(path)
        if entry is None:
            raise hub_error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        if not entry["lfs"]:
            return self.send_file(self.hub.blob(entry["sha256"]), {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'})
        oid = entry["sha256"]
        self.reply(
            None,
            302,
            {
                "Location": f"{self.hub.cdn.url}/_cdn/{oid}?sig={self.hub.sign(oid)}",
                "X-Repo-Commit": sha,
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(entry["size"]),
            },
        )

    def check_signature(self, oid):
        if self.query.get("sig") != [self.hub.sign(oid)]:
            raise hub_error(403, None, "bad signature")

    def cdn(self, oid):
        self.check_signature(oid)
        self.send_file(self.hub.blob(oid), {"ETag": f'"{oid[:32]}"'})

    # ------------------------------------------------------------------ writing
    def preupload(self, kind, repo_id, revision):
        repo, body, files = self.repo(kind, repo_id, write="create_pr" not in self.query), self.json(), []
        tree, ignored = repo["commits"][self.sha(repo, revision)]["tree"], body.get("gitIgnore", "").split()
        for file in body["files"]:
            path, old = file["path"], tree.get(file["path"])
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE or b"\0" in base64.b64decode(file["sample"])
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, p) for p in ignored),
                    **({"oid": old["sha256"] if old["lfs"] else old["oid"]} if old else {}),
                }
            )
        self.reply({"files": files})

    def lfs_batch(self, kind, repo_id):
        self.repo(kind, repo_id, write=True)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in self.json()["objects"]]
        for o in objects:
            href, sig = f"{self.hub.url}/_lfs/{o['oid']}", f"?sig={self.hub.sign(o['oid'])}"
            if not self.hub.blob(o["oid"]).exists():
                o["actions"] = {"upload": {"href": href + sig}, "verify": {"href": f"{href}/verify{sig}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_object(self, oid, verify):
        self.check_signature(oid)  # an upload carries no token, as with a presigned URL
        if verify:
            return self.reply({}, 200 if self.hub.blob(oid).exists() else 404)
        digest, part = hashlib.sha256(), self.hub.blob(f"{oid}.{secrets.token_hex(4)}")
        with open(part, "wb") as file:
            for chunk in self.unread:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != oid:
            part.unlink()
            raise hub_error(400, None, "content does not match its oid")
        os.replace(part, self.hub.blob(oid))
        self.reply({})

    def post_commit(self, kind, repo_id, revision):
        as_pr = "create_pr" in self.query
        repo, user = self.repo(kind, repo_id, write=not as_pr), self.user(needed=True)
        header, *operations = (json.loads(line) for line in self.body().splitlines() if line.strip())
        header = header["value"]
        with self.hub.lock:
            head = self.sha(repo, revision)
            if not as_pr and not head.startswith(header.get("parentCommit", "")):
                raise hub_error(412, None, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo["commits"][head]["tree"])
            for operation in operations:
                self.apply(tree, operation["key"], operation["value"])
            number = sum(name.startswith("refs/pr/") for name in repo["refs"]) + 1
            ref = (
                f"refs/pr/{number}" if as_pr else revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            )
            if as_pr:
                repo["refs"][ref] = head
            elif ref not in repo["refs"]:
                raise hub_error(400, None, f"{revision} is not a branch")
            sha = self.hub.commit(repo, ref, tree, header["summary"], header.get("description", ""), user["name"])
        page = self.page(kind, repo_id)
        pull_request = {"pullRequestUrl": f"{page}/discussions/{number}"} if as_pr else {}
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", **pull_request})

    def apply(self, tree, key, value):
        path = value["path"].rstrip("/")
        if key == "file":
            tree[path] = self.hub.add_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.hub.blob(value["oid"]).exists():
                raise hub_error(400, None, f"Your push was rejected: the LFS object {value['oid']} is missing")
            tree[path] = self.hub.add_lfs(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in tree if p == path or (key == "deletedFolder" and p.startswith(path + "/"))]
            if not gone:
                raise hub_error(404, "EntryNotFound", "A file with this name doesn't exist")
            for p in gone:
                del tree[p]


if __name__ == "__main__":
    print("HF_ENDPOINT=" + HubServer(sys.argv[1], int(sys.argv[2])).start().url, flush=True)
    threading.Event().wait()
