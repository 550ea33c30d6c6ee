import hashlib
import os
import shutil
import subprocess

import pytest
from vitgraph.bench import commands, provenance
from vitgraph.bench.__main__ import main
from vitgraph.bench.provenance import ROOT, commit_digest, source_digest, sources
from vitgraph.bench.report import conditions


def git(root, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *arguments],
        check=True, capture_output=True, text=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path):
    """A tree with sources and other files, and no history."""
    root = tmp_path / "tree"
    files = {
        "kernels/a.py": "a = 1\n", "bench/z.py": "", "bench/sub dir/é.py": "x\n",
        "bench/notes.txt": "n", "README.md": "r", "tests/t.py": "t",
    }  # fmt: skip
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def repository(tree):
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    return tree


def test_digest_is_that_of_sorted_paths_and_bytes(tree):
    files = (
        b"bench/sub dir/\xc3\xa9.py\x002\x00x\n",
        b"bench/z.py\x000\x00",
        b"kernels/a.py\x006\x00a = 1\n",
    )
    assert source_digest(tree) == hashlib.sha256(b"".join(files)).hexdigest()


def test_digest_sees_sources_only(tree):
    before = source_digest(tree)
    for name in ("README.md", "bench/notes.txt", "tests/t.py"):
        (tree / name).write_text("changed")
    assert source_digest(tree) == before
    (tree / "kernels/a.py").rename(tree / "kernels/b.py")
    renamed = source_digest(tree)
    (tree / "kernels/b.py").write_text("a = 2\n")
    (tree / "encoder").mkdir()
    (tree / "encoder/new.py").write_text("")
    assert len({before, renamed, source_digest(tree)}) == 3


def test_head_is_the_commit_and_changed_sources_are_dirty(repository):
    head = git(repository, "rev-parse", "HEAD")
    clean = sources(repository, {})
    assert (clean.commit, clean.dirty) == (head, False)
    assert clean.source_digest == commit_digest("HEAD", repository) == source_digest(repository)
    (repository / "README.md").write_text("changed")
    assert sources(repository, {}) == clean
    (repository / "capture").mkdir()
    (repository / "capture/never_added.py").write_text("")
    assert sources(repository, {}).dirty is True


def test_the_variable_names_the_commit(repository):
    first = git(repository, "rev-parse", "HEAD")
    (repository / "kernels/a.py").write_text("a = 2\n")
    git(repository, "commit", "-qam", "two")
    second = git(repository, "rev-parse", "HEAD")
    for told, dirty in ((second, False), (second[:7].upper(), False), (first[:12], True)):
        found = sources(repository, {"VITGRAPH_COMMIT": told})
        assert (found.commit, found.dirty) == (told.lower(), dirty)
    # the copy was made of `second`, but its history stops at `first`
    git(repository, "reset", "-q", "--soft", first)
    found = sources(repository, {"VITGRAPH_COMMIT": first})
    assert (found.commit, found.dirty) == (first, True)
    assert sources(repository, {"VITGRAPH_COMMIT": "0123456789"}).dirty is None


def test_a_copy_without_history_has_the_same_digest(repository, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns(".git"))
    head = git(repository, "rev-parse", "HEAD")
    found = sources(copy, {"VITGRAPH_COMMIT": head})
    assert (found.commit, found.dirty) == (head, None)
    assert found.source_digest == commit_digest(head, repository)
    assert sources(copy, {}) == provenance.Sources(found.source_digest, None, None)
    assert sources(copy, {"VITGRAPH_COMMIT": ""}).commit is None


def test_a_history_above_the_tree_is_not_its_own(repository):
    """As for a package installed inside somebody's repository."""
    inner = repository / "site"
    shutil.copytree(repository / "kernels", inner / "kernels")
    assert sources(inner, {}).commit is None


@pytest.mark.parametrize(
    "told", ["abc123", "g" * 40, "a" * 41, "abcdef0-dirty", "HEAD", "abcdef0\n"]
)
def test_other_values_of_the_variable_are_refused(told, tree):
    with pytest.raises(ValueError, match="7 to 40 hexadecimal digits"):
        sources(tree, {"VITGRAPH_COMMIT": told})


def test_conditions_carry_the_sources(monkeypatch):
    monkeypatch.setenv("VITGRAPH_COMMIT", "0123456")
    meta = conditions(["x"])
    assert meta["source_digest"] == source_digest(ROOT)
    assert (meta["commit"], meta["dirty"]) == ("0123456", None)


def test_a_wrong_commit_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setenv("VITGRAPH_COMMIT", "main")
    monkeypatch.setattr(commands, "MEASURING", {"packing": lambda arguments: pytest.fail("it ran")})
    assert main(["packing"]) == 2
    assert "VITGRAPH_COMMIT = 'main'" in capsys.readouterr().err


def test_digest_command(capsys, repository, monkeypatch):
    assert main(["digest"]) == 0
    assert capsys.readouterr().out.strip() == source_digest(ROOT)
    assert main(["digest", "no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    monkeypatch.setattr(commit_digest, "__defaults__", (repository,))
    assert main(["digest", "HEAD"]) == 0
    assert capsys.readouterr().out.strip() == source_digest(repository)
