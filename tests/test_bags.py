"""Which bags a folder holds: found at any depth, under odd names; their bytes make their hash."""

from __future__ import annotations

import os
import resource
import shutil

import pytest

from rosbag_dataset import cache_key, find_bags, load_episodes
from tests.bags import edit_metadata, settings, storage_file, write_bag
from tests.checks import TAKE, assert_is_take, both_storages, error_of, flip, python


def test_bags_are_found_recursively_and_sorted(tmp_path):
    """Bags at any depth, through links, once each; hidden folders and files are passed over."""
    root = tmp_path / "bags"
    for name in ("b", "a/deep/er", ".hidden/c", "a/.trash/d"):
        write_bag(root / name, TAKE.messages()[:3])
    write_bag(tmp_path / "elsewhere" / "e", TAKE.messages()[:3])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)  # a loop
    (root / ".partial.db3").write_bytes(b"")
    (root / "notes.txt").write_text("no bag")
    assert [b.name for b in find_bags(root)] == ["a/deep/er", "b", "link/e"]


def test_a_metadata_file_above_hides_no_bag(tmp_path):
    """One that was left in a folder of bags is a bad bag; the bags below are found, under names of their own."""
    for name in ("bags", "bags/a", "bags/bags"):
        write_bag(tmp_path / name, TAKE.messages())
    (tmp_path / "bags" / "bags.db3").unlink()
    bad, *good = find_bags(tmp_path / "bags")
    assert [bad.name, *(bag.name for bag in good)] == [".", "a", "bags"]
    assert "metadata.yaml lists bags.db3, which is not there" in bad.problem and "remove it if" in bad.problem
    episodes, skipped = load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, False)
    assert [e.name for e in episodes] == ["a", "bags"] and [s["bag"] for s in skipped] == ["."]
    (tmp_path / "bags" / "metadata.yaml").write_text("about: my bags\n")
    shutil.rmtree(tmp_path / "bags" / "bags")
    bad = find_bags(tmp_path / "bags")[1]
    assert bad.name == "bags" and "not a rosbag2 metadata file" in bad.problem and "remove it if" in bad.problem


def test_folder_that_is_one_bag(tmp_path):
    """data.bag_dir may be a single bag; the episode is called after the folder."""
    write_bag(tmp_path / "solo", TAKE.messages())
    assert [b.name for b in find_bags(tmp_path / "solo")] == ["solo"]
    assert_is_take(tmp_path / "solo")


@both_storages
def test_renamed_storage_file(tmp_path, storage):
    """The storage file under another name than metadata.yaml says."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage)
    file = storage_file(bag)
    file.rename(file.with_stem("renamed_later"))
    assert_is_take(tmp_path / "bags")


@both_storages
@pytest.mark.parametrize("name", ["2024-05-01.bag", "run #1", "50%41", "what?", "data.set", "two  words", "grün"])
def test_folder_names(tmp_path, storage, name):
    """Folder names that look like a ROS 1 file, or that an URI would take apart."""
    bag = write_bag(tmp_path / "plain", TAKE.messages(), storage)
    (tmp_path / "bags").mkdir()
    bag.rename(tmp_path / "bags" / name)
    assert [b.name for b in find_bags(tmp_path / "bags")] == [name]
    assert_is_take(tmp_path / "bags")


def test_bag_dir_that_is_none(tmp_path):
    """A bag_dir that is missing, a file, or empty: what was found, and which key to set."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {"absent": "found nothing there", "file": "found a file there", "empty": "no ROS 2 bag"}
    for name, fact in cases.items():
        message = error_of(lambda name=name: load_episodes(settings(tmp_path / name), 1, False))
        assert message.startswith("data.bag_dir: ") and name in message and fact in message


@pytest.mark.parametrize("where", ["first MiB", "last MiB", "middle", "metadata", "size", "name"])
def test_identity_is_that_of_the_bytes(tmp_path, where):
    """Size, metadata.yaml, first and last MiB, and the relative path count, and so the cache's key."""
    bag_dir = tmp_path / "bags"
    path = write_bag(bag_dir / "a", TAKE.messages())
    file = storage_file(path)
    with file.open("ab") as stream:
        stream.write(bytes(3 << 20))
    (bag,) = find_bags(bag_dir)
    key = cache_key(bag, bag.content_hash(), settings(bag_dir))
    if where == "metadata":
        (path / "metadata.yaml").write_text((path / "metadata.yaml").read_text() + "\n")
    elif where == "size":
        os.truncate(file, file.stat().st_size - 1)
    elif where == "name":
        path.rename(bag_dir / "b")
    else:
        flip(file, {"first MiB": 1000, "last MiB": -1000, "middle": file.stat().st_size // 2}[where])
    (bag,) = find_bags(bag_dir)
    assert (cache_key(bag, bag.content_hash(), settings(bag_dir)) != key) == (where != "middle")


BILLION = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[" * 100_000, "more than 100 levels deep"),
        ("- " * 100_000 + "x", "more than 100 levels deep"),
        ("{a: " * 100_000, "more than 100 levels deep"),
        (BILLION, "yaml.org,2002:merge"),
        (BILLION.replace("<<", "!!merge x"), "yaml.org,2002:merge"),
    ],
    ids=["brackets", "dashes", "braces", "merges", "tagged-merges"],
)
def test_metadata_that_would_crash_the_parser_is_a_problem_of_the_bag(tmp_path, text, fact):
    """libyaml's composer recurses until the stack is full, and merge keys multiply; in a process of its own."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metadata.yaml").write_text(text)
    code = "import sys, pathlib, rosbag_dataset; print(rosbag_dataset.find_bags(pathlib.Path(sys.argv[1])))"
    process = python(code, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, (process.returncode, stderr)
    assert "metadata.yaml is not a rosbag2 metadata file" in stdout and fact in stdout


def test_metadata_with_harmless_aliases_is_read(tmp_path):
    """Python's writer makes an alias of a value that stands twice, as a script that edits metadata may do."""
    write_bag(tmp_path / "a", TAKE.messages())
    edit_metadata(tmp_path / "a", lambda info: info.update(ends_with=info["duration"]))
    assert "&id001" in (tmp_path / "a" / "metadata.yaml").read_text()
    (bag,) = find_bags(tmp_path)
    assert not bag.problem
