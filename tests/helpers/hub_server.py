"""A Hub on loopback: the endpoints that `huggingface_hub` calls to push and pull, over repositories in memory.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

A commit is a mapping from paths to the digests of their contents; branches and tags name commits. Files of weights go
the way of large files (batch, PUT, commit by digest), all others travel inside of the commit. A repository that is
private is not there for those without the token.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER = "me"
LARGE_FILES = (".safetensors", ".bin")


class Refusal(Exception):
    """An answer other than 200: status, the Hub's error code, words, and more of the answer's JSON."""

    def __init__(self, status: HTTPStatus, code: str | None, message: str, **more: str):
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


@dataclass
class Repository:
    """Commits by id, and what names them."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.branches["main"] = self.add_commit({})

    def add_commit(self, files: dict[str, str]) -> str:
        """Keeps a state of the files; returns its id, 40 hexadecimal digits as git's."""
        text = json.dumps([files, len(self.commits)], sort_keys=True)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        return commit

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit id names."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if revision in self.commits:
            return revision
        raise Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")


class HubServer(ThreadingHTTPServer):
    """The server and what it stores.

    `cut_uploads` makes it hang up in the middle of every large file; a client sets it by a POST of true or false to
    `/cut_uploads`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.cut_uploads = False
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def environment(self, home, token: str = TOKEN) -> dict[str, str]:
        """What a process needs to take this server for the Hub, and the folder `home` for its caches."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path of a repository at a revision."""
        repository = self.repositories[name]
        files = repository.commits[repository.resolve(revision)]
        return {path: self.contents[digest] for path, digest in files.items()}

    def keep(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest


class Handler(BaseHTTPRequestHandler):
    """One request: finds the method for its path, answers JSON or the bytes of a file."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer of headers and content waits for an acknowledgement
    server: HubServer

    def log_message(self, *arguments):
        """Keeps quiet: `HubServer.requests` has them."""

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        try:
            if path == "cut_uploads":
                self.server.cut_uploads = json.loads(self.body())
                self.answer({})
            elif self.command == "PUT":
                self.put_large_file(path)
            elif path.startswith("api/"):
                self.answer(self.call_api(path.removeprefix("api/"), self.body()))
            elif path.endswith(".git/info/lfs/objects/batch"):
                self.answer(self.large_file_batch(path.split(".git/")[0], json.loads(self.body())))
            elif "/resolve/" in path:
                self.send_file(path)
            else:
                raise Refusal(HTTPStatus.NOT_FOUND, None, f"no such endpoint: {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            self.answer({"error": refusal.message, **refusal.more}, refusal.status, headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content, status=HTTPStatus.OK, headers=None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- repositories -------------------------------------------------------------------------------------------

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository:
        """The repository, where it may be seen. Without a token, a missing one is refused as a private one is."""
        repository = self.server.repositories.get(name)
        if not self.signed_in and (repository is None or repository.private):
            # Clients take a bare 401 for this too, but only of addresses that start with https.
            raise Refusal(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        return repository

    def call_api(self, path: str, body: bytes):
        """`models/{user}/{name}/{verb}/{revision}/...`, or one of the few paths that name no repository."""
        if path == "repos/create":
            return self.create(json.loads(body))
        if path == "validate-yaml":
            return self.validate_card(json.loads(body)["content"])
        if path == "whoami-v2":
            return {"name": USER, "type": "user", "orgs": []}
        kind, user, name, *rest = path.split("/")
        if kind != "models":
            raise Refusal(HTTPStatus.NOT_FOUND, None, f"no such endpoint: {path}")
        verb, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        # A verb that this server lacks must fail loudly, whatever the client makes of a missing file.
        answer = getattr(self, f"api_{verb.replace('-', '_')}", None)
        if answer is None:
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, None, f"no such endpoint: {path}")
        if self.command == "POST" and not self.signed_in:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid username or password.")
        repository = self.repository(f"{user}/{name}")
        with self.server.lock:
            return answer(f"{user}/{name}", repository, revision, body)

    def create(self, wanted: dict) -> dict:
        if not self.signed_in:
            raise Refusal(HTTPStatus.UNAUTHORIZED, None, "Invalid username or password.")
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        with self.server.lock:
            if name in self.server.repositories:
                raise Refusal(HTTPStatus.CONFLICT, None, "You already created this model repo", url=url)
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
        return {"url": url, "name": name}

    def validate_card(self, content: str) -> dict:
        """Refuses a card whose metadata is no YAML mapping."""
        metadata = content.split("---\n")[1] if content.startswith("---\n") else ""
        try:
            loaded = yaml.safe_load(metadata)
        except yaml.YAMLError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, None, f"Invalid metadata: {type(error).__name__}") from error
        if not isinstance(loaded, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, None, "Invalid metadata: not a mapping")
        return {"errors": [], "warnings": []}

    def api_revision(self, name: str, repository: Repository, revision: str, body: bytes) -> dict:
        commit = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        known = {"id": name, "modelId": name, "private": repository.private, "tags": []}
        return {**known, "sha": commit, "siblings": siblings}

    def api_refs(self, name: str, repository: Repository, revision: str, body: bytes) -> dict:
        kinds = {"branches": repository.branches, "tags": repository.tags}
        return {
            kind: [{"name": key, "ref": f"refs/{key}", "targetCommit": commit} for key, commit in names.items()]
            for kind, names in kinds.items()
        } | {"converts": []}

    def api_tree(self, name: str, repository: Repository, revision: str, body: bytes) -> list:
        revision, _, folder = revision.partition("/")
        files = repository.commits[repository.resolve(revision)]
        found = {path: digest for path, digest in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not found:
            raise Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{folder} does not exist")
        return [self.describe(path, digest) for path, digest in found.items()]

    def describe(self, path: str, digest: str) -> dict:
        size = len(self.server.contents[digest])
        large = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if path.endswith(LARGE_FILES) else {}
        return {"type": "file", "path": path, "oid": digest[:40], "size": size, **large}

    def api_branch(self, name: str, repository: Repository, branch: str, body: bytes) -> dict:
        if branch in repository.branches:
            raise Refusal(HTTPStatus.CONFLICT, None, "Reference already exists")
        repository.branches[branch] = repository.resolve(json.loads(body).get("startingPoint", "main"))
        return {}

    def api_tag(self, name: str, repository: Repository, revision: str, body: bytes) -> dict:
        repository.tags[json.loads(body)["tag"]] = repository.resolve(revision)
        return {}

    # -- uploads ------------------------------------------------------------------------------------------------

    def api_preupload(self, name: str, repository: Repository, revision: str, body: bytes) -> dict:
        files = repository.commits[repository.resolve(revision)]
        answers = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
            known = files[path][:40] if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return {"files": answers}

    def large_file_batch(self, name: str, wanted: dict) -> dict:
        self.repository(name)
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.contents:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def put_large_file(self, path: str) -> None:
        if self.server.cut_uploads:
            self.rfile.read1(1024)
            self.close_connection = True
            self.connection.close()
            return
        content, digest = self.body(), path.removeprefix("large/")
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refusal(HTTPStatus.BAD_REQUEST, None, "the content has another digest")
        self.server.keep(content)
        self.answer(b"")

    def api_commit(self, name: str, repository: Repository, branch: str, body: bytes) -> dict:
        if branch not in repository.branches:
            raise Refusal(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = self.server.keep(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.contents:
                    raise Refusal(HTTPStatus.BAD_REQUEST, None, f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "header":
                message = value["summary"]
            else:
                raise Refusal(HTTPStatus.NOT_IMPLEMENTED, None, f"no such operation: {item['key']}")
        commit = repository.branches[branch] = repository.add_commit(files)
        repository.messages[commit] = message
        return {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True}

    # -- downloads ----------------------------------------------------------------------------------------------

    def send_file(self, path: str) -> None:
        """`{user}/{name}/resolve/{revision}/{path}`; a revision may hold slashes, as `refs/pr/1`."""
        name, _, rest = path.partition("/resolve/")
        repository = self.repository(name)
        revision, _, file = rest.partition("/")
        commit = repository.resolve(revision)
        digest = repository.commits[commit].get(file)
        if digest is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        content = self.server.contents[digest]
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.answer(content, headers=headers)
