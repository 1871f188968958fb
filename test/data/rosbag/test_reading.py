# SPDX-License-Identifier: Apache-2.0
"""Bags of every format are read alike; what is broken is said and the rest is read; no claim in a bag is believed."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from data.rosbag.making import (
    START,
    STEP,
    McapShape,
    Recorded,
    packed,
    stream,
    write_mcap,
    write_ros1,
    write_ros2,
)

from ukd_ros.data.bags import BagError, BagReader, bag_views
from ukd_ros.data.rosbag import compression, mcap
from ukd_ros.data.rosbag.compression import decompressed, unpack_file, zstd
from ukd_ros.data.rosbag.info import bag_info
from ukd_ros.data.rosbag.message_types import INFO_TYPE
from ukd_ros.data.rosbag.storage import MAX_BYTES, BrokenMessage
from ukd_ros.geometry.view import View

IMAGES = "/camera/image_raw"
MAGICS = [b"\x89MCAP0\r\n", b"SQLite format 3\x00" + bytes(84), b"#ROSBAG V2.0\n" + bytes(40)]


def contents(path: Path, partial: bool = False) -> list[tuple[str, int, bytes]]:
    with BagReader(path, partial) as bag:
        return [(m.topic, m.time_ns, m.data) for m in bag.messages()]


def lone(path: Path) -> Path:
    """Return the only storage file of a bag's folder."""
    (file,) = (p for p in path.iterdir() if p.name != "metadata.yaml")
    return file


def metadata(path: Path, change: Callable[[dict], None]) -> None:
    file = path / "metadata.yaml"
    content = yaml.safe_load(file.read_text())
    change(content["rosbag2_bagfile_information"])
    file.write_text(yaml.safe_dump(content))


FORMATS: dict[str, Callable[[Path, list[Recorded]], Path]] = {
    "mcap": lambda p, m: write_ros2(p / "bag", m),
    "mcap_zstd_chunks": lambda p, m: write_ros2(p / "bag", m, mode="storage"),
    "mcap_messages": lambda p, m: write_ros2(p / "bag", m, mode="message"),
    "mcap_file": lambda p, m: write_ros2(p / "bag", m, mode="file", version=9),
    "sqlite": lambda p, m: write_ros2(p / "bag", m, "sqlite3"),
    "sqlite_messages": lambda p, m: write_ros2(p / "bag", m, "sqlite3", "message"),
    "sqlite_file": lambda p, m: write_ros2(p / "bag", m, "sqlite3", "file", 9),
    "lone_mcap": lambda p, m: lone(write_ros2(p / "bag", m)),
    "lone_db3": lambda p, m: lone(write_ros2(p / "bag", m, "sqlite3")),
    "mcap_lz4": lambda p, m: write_mcap(p / "bag.mcap", m, McapShape(codec="lz4")),
    "mcap_zstd_by_hand": lambda p, m: write_mcap(p / "bag.mcap", m, McapShape(codec="zstd")),
    "mcap_without_index": lambda p, m: write_mcap(p / "bag.mcap", m, McapShape(index=False, codec="lz4")),
    "mcap_without_chunks": lambda p, m: write_mcap(p / "bag.mcap", m, McapShape(chunk=0)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_messages(kind: str, tmp_path: Path) -> None:
    messages = stream(9)
    bag = FORMATS[kind](tmp_path, messages)
    expected = sorted((m.topic, m.time_ns, m.data) for m in messages)
    assert sorted(contents(bag)) == expected
    with BagReader(bag) as reader:
        assert reader.counts == {IMAGES: 9, "/camera/camera_info": 9}
        index = reader.index([IMAGES])
        np.testing.assert_array_equal(index.times_ns, START + STEP * np.arange(9))
        assert reader.read(index[5]).data == messages[11].data, "any message can be had by its place"
        assert reader.lost_bytes == 0 and not reader.damage


@pytest.mark.parametrize("codec", ["none", "bz2", "lz4"])
def test_ros1_bags_give_the_same_views(codec: str, tmp_path: Path) -> None:
    bag = write_ros1(tmp_path / "old.bag", stream(5, ros1=True), codec)
    new = write_ros2(tmp_path / "new", stream(5))
    for old, view in zip(bag_views(bag), bag_views(new), strict=True):
        assert isinstance(old, View) and isinstance(view, View)
        np.testing.assert_array_equal(old.image, view.image)
        np.testing.assert_array_equal(old.camera.matrix, view.camera.matrix)
        assert (old.stamp_ns, old.frame_id) == (view.stamp_ns, view.frame_id)


def test_a_folder_of_several_files_is_one_bag_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    for number in range(11):
        write_mcap(folder / f"bag_{number}.mcap", stream(2, first=2 * number))
    with BagReader(folder) as bag:
        np.testing.assert_array_equal(np.diff(bag.index([IMAGES]).times_ns), STEP)
        assert bag.counts[IMAGES] == 22
        assert any("no metadata.yaml" in warning for warning in bag.warnings)


def test_recorded_order_and_order_of_time_are_both_to_be_had(tmp_path: Path) -> None:
    late, early = stream(3, start_ns=START + 10**12), stream(3)
    bag = write_mcap(tmp_path / "bag.mcap", [*late, *early], McapShape(chunk=2))
    with BagReader(bag) as reader:
        index = reader.index([IMAGES])
        assert index.times_ns[0] > index.times_ns[-1]
        times = [m.time_ns for m in reader.messages()]
        assert times == sorted(times) and len(times) == 12


# ---- truncated and damaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [McapShape(), McapShape(codec="zstd"), McapShape(index=False), McapShape(chunk=0)])
def test_a_truncated_mcap_is_read_as_far_as_it_is_whole(shape: McapShape, tmp_path: Path) -> None:
    whole = write_mcap(tmp_path / "whole.mcap", stream(12), shape)
    size = whole.stat().st_size
    every = contents(whole)
    counts = []
    for cut in (0.9, 0.5, 0.2):
        file = tmp_path / "cut.mcap"
        file.write_bytes(whole.read_bytes()[: int(cut * size)])
        with pytest.raises(BagError, match="breaks off"):
            contents(file)
        read = contents(file, partial=True)
        assert set(read) <= set(every)
        counts.append(len(read))
        with BagReader(file, partial=True) as bag:
            list(bag.messages())
            (reason,) = bag.damage
            lost = int(re.findall(r"\((\d+) bytes, ([\d.]+) % of the file\)", reason)[0][0])
            assert 0 < bag.lost_bytes == lost
            held = 0 if shape.codec else sum(len(data) for _, _, data in read)
            assert bag.lost_bytes <= bag.size - held, "what was read is not counted as lost"
    # At most the messages of one chunk are missing beyond the share that was cut away.
    assert all(count >= share * 24 - 5 for count, share in zip(counts, (0.9, 0.5, 0.2), strict=True))


def test_an_mcap_cut_anywhere_never_fails_and_never_invents(tmp_path: Path) -> None:
    whole = write_mcap(tmp_path / "whole.mcap", stream(2), McapShape(chunk=2, codec="lz4"))
    every, data = set(contents(whole)), whole.read_bytes()
    file = tmp_path / "cut.mcap"
    before = 0
    for cut in [*range(8, 400), *range(400, len(data), 997), len(data)]:
        file.write_bytes(data[:cut])
        read = contents(file, partial=True)
        assert set(read) <= every and len(read) >= before
        before = len(read)
    assert before == 4


def test_a_broken_chunk_costs_itself_only(tmp_path: Path) -> None:
    file = write_mcap(tmp_path / "bag.mcap", stream(12))
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + 20_000] ^= 0xFF  # inside of an image
    file.write_bytes(bytes(data))
    with pytest.raises(BagError, match="damaged"):
        contents(file)
    with BagReader(file, partial=True) as bag:
        assert len(list(bag.messages())) == 24 - 4, "the chunk of four is left out"
        assert "checksum" in bag.damage[0] and bag.broken.total() == 4
        assert 0 < bag.lost_bytes < len(data) / 3


def test_behind_a_gap_in_the_records_the_summary_shows_where_to_go_on(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(60), mode="storage")  # with the summary that recorders write
    file, every = lone(bag), contents(bag)
    data = file.read_bytes()
    chunks = [m.start() for m in re.finditer(rb"\x06.{8}.{28}\x04\x00\x00\x00zstd", data, re.DOTALL)]
    assert len(chunks) >= 4
    gap = bytes(chunks[2] - chunks[1])
    file.write_bytes(data[: chunks[1]] + gap + data[chunks[2] :])
    read = contents(bag, partial=True)
    assert 60 <= len(read) < 120 and set(read) <= set(every)
    assert {m[1] for m in read} >= {every[0][1], every[-1][1]}, "what is before and behind it is read"
    with BagReader(bag, partial=True) as reader:
        assert reader.lost_bytes == len(gap)


def test_a_truncated_database_is_read_as_far_as_its_pages_go(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(30), "sqlite3")
    file, every = lone(bag), set(contents(bag))
    size = file.stat().st_size
    os.truncate(file, int(0.6 * size))
    with pytest.raises(BagError, match="breaks off"):
        contents(bag)
    read = contents(bag, partial=True)
    assert 20 <= len(read) < 60 and set(read) <= every
    with BagReader(bag, partial=True) as reader:
        assert reader.lost_bytes == pytest.approx(0.4 * size, rel=0.01)


def test_a_log_that_was_never_merged_is_named(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(2), "sqlite3")
    lone(bag).with_name(f"{lone(bag).name}-wal").write_bytes(b"x" * 5000)
    with BagReader(bag, partial=True) as reader:
        assert "5000 bytes" in reader.damage[0] and "wal_checkpoint" in reader.damage[0]


def test_truncated_compressed_files_are_read_as_far_as_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    bag = write_ros2(tmp_path / "bag", stream(60), mode="file")
    file = lone(bag)
    noise = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    plain = zstd.decompress(file.read_bytes())
    file.write_bytes(zstd.compress(plain[:-100] + noise)[:-30_000])
    with pytest.raises(BagError, match="breaks off"):
        contents(bag)
    assert len(contents(bag, partial=True)) > 0
    assert not list(temporary.iterdir()), "nothing stays"


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_compressed_file_of_several_frames_is_read_to_its_end(storage: str, tmp_path: Path) -> None:
    messages = stream(4)
    plain = lone(write_ros2(tmp_path / "bag", messages, storage))
    data, third = plain.read_bytes(), plain.stat().st_size // 3
    file = tmp_path / f"many{plain.suffix}.zstd"
    file.write_bytes(b"".join(zstd.compress(part) for part in (data[:third], data[third:], b"")))
    assert contents(file) == contents(plain) and len(contents(file)) == 8
    file.write_bytes(zstd.compress(data) + b"\x00" * 40)
    with BagReader(file, partial=True) as bag:
        assert len(list(bag.messages())) == 8 and "damaged" in bag.damage[0]


def test_an_mcap_cut_between_the_index_records_of_a_chunk_loses_no_message(tmp_path: Path) -> None:
    whole = write_mcap(tmp_path / "whole.mcap", stream(8), McapShape(chunk=8, end=False))
    every, size = sorted(contents(whole, partial=True)), 9 + 6 + 16 * 4
    for cut in (size, size - 10, 2 * size):
        file = tmp_path / "cut.mcap"
        file.write_bytes(whole.read_bytes()[:-cut])
        assert sorted(contents(file, partial=True)) == every


# ---- lies --------------------------------------------------------------------------------------------------------


def test_metadata_that_lie_are_named_and_not_believed(tmp_path: Path) -> None:
    messages = stream(6)
    bag = write_ros2(tmp_path / "bag", messages)

    def lie(about: dict) -> None:
        about["message_count"] = 10**15
        about["duration"]["nanoseconds"] = 10**20
        about["starting_time"]["nanoseconds_since_epoch"] = -5
        about["topics_with_message_count"][0]["message_count"] = 7
        about["relative_file_paths"] = ["bag.mcap", "gone.mcap", "../../secret.mcap", "/etc/passwd"]
        about["compression_format"], about["compression_mode"] = "zstd", "MESSAGE"
        about["storage_identifier"] = "sqlite3"
        about["version"] = 99

    metadata(bag, lie)
    assert len(contents(bag)) == 12
    found = bag_info(bag)
    assert [topic.count for topic in found.topics] == [6, 6]
    assert found.duration_s == pytest.approx(0.5)
    said = "\n".join(found.warnings)
    for text in (
        "1000000000000000 messages, 12 are there",
        "absurd",
        "7 messages of /camera/camera_info, 6",
        "gone.mcap, which is not there",
        "../../secret.mcap, a path outside",
        "/etc/passwd, a path outside",
    ):
        assert text in said, said


ALIASES = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
NONSENSE = [
    "", "[", "a: [1, 2", "rosbag2_bagfile_information: 3", "&a [*a]", "x" * 9_000_000,
    f"{ALIASES}rosbag2_bagfile_information:\n  storage_identifier: *a11\n",
    f"{MERGES}rosbag2_bagfile_information: *a11\n",
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE)
def test_metadata_that_are_nonsense_do_not_matter(text: str, tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(3))
    (bag / "metadata.yaml").write_text(text)
    assert len(contents(bag)) == 6
    assert any("metadata.yaml" in warning for warning in bag_info(bag).warnings)


def test_no_path_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    secret = write_mcap(tmp_path / "secret.mcap", stream(3, image_topic="/secret"))
    bag = write_ros2(tmp_path / "bag", stream(3))
    (bag / "link.mcap").symlink_to(secret)
    metadata(bag, lambda about: about.update(relative_file_paths=["../secret.mcap", "link.mcap"]))
    with BagReader(bag) as reader:
        assert "/secret" not in reader.topics
        assert any("link.mcap" in w and "not followed" in w for w in reader.warnings)
        assert any("../secret.mcap" in w and "not followed" in w for w in reader.warnings)


def test_a_converted_copy_in_the_same_folder_is_not_read_twice(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(3))
    shutil.copy(lone(write_ros2(tmp_path / "other", stream(3), "sqlite3")), bag / "bag.db3")
    with BagReader(bag) as reader:
        assert reader.counts[IMAGES] == 3
        assert any("only those of .mcap" in warning for warning in reader.warnings)


def test_unknown_types_are_listed_and_skipped(tmp_path: Path) -> None:
    odd = [Recorded("/odd", "my_msgs/msg/Strange", START + n, bytes(9)) for n in range(4)]
    bag = write_ros2(tmp_path / "bag", [*odd, *stream(3)])
    found = bag_info(bag)
    assert {t.topic: t.known for t in found.topics}["/odd"] is False
    assert "/odd" in found.text() and "not understood" in found.text()
    assert len([v for v in bag_views(bag) if isinstance(v, View)]) == 3
    with BagReader(bag) as reader, pytest.raises(BagError, match="not understood"):
        next(iter(reader.messages(["/odd"]))).decoded()


# ---- bombs -------------------------------------------------------------------------------------------------------


def test_a_chunk_that_claims_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    bag = write_mcap(tmp_path / "bag.mcap", stream(4), McapShape(codec="zstd", claimed=2**40))
    with BagReader(bag, partial=True) as reader:
        assert list(reader.messages()) == [] and str(2**40) in reader.damage[0]


def test_chunks_without_index_that_hold_endless_messages_are_read_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Recorded("/a", INFO_TYPE, START + n, b"") for n in range(400)]
    bag = write_mcap(tmp_path / "bag.mcap", many, McapShape(chunk=100, codec="zstd", index=False))
    assert len(contents(bag)) == 400
    monkeypatch.setattr(mcap, "MAX_RECORDS", 250)
    with BagReader(bag, partial=True) as reader:
        assert 200 <= len(list(reader.messages())) <= 250
        assert "holds too much" in reader.damage[0] and reader.lost_bytes > 0
    monkeypatch.undo()
    monkeypatch.setattr(mcap, "MAX_SCANNED", 10_000)
    monkeypatch.setattr(mcap, "SCAN_GROWTH", 0)
    with BagReader(bag, partial=True) as reader:
        assert len(list(reader.messages())) == 300, "three chunks of 3100 bytes"


def test_an_index_of_ros1_that_names_a_chunk_again_and_again_is_refused(tmp_path: Path) -> None:
    bag = write_ros1(tmp_path / "a.bag", [Recorded("/a", INFO_TYPE, START + n, b"") for n in range(300)])
    data = bytearray(bag.read_bytes())
    count_at, place_at = data.index(b"chunk_count=") + 12, data.index(b"index_pos=") + 10
    at = struct.unpack_from("<Q", data, place_at)[0]
    while at < len(data):  # to the last record, which is that of the chunk
        head = struct.unpack_from("<I", data, at)[0]
        end = at + 8 + head + struct.unpack_from("<I", data, at + 4 + head)[0]
        record, at = bytes(data[at:end]), end
    struct.pack_into("<I", data, count_at, 101)
    bag.write_bytes(data + 100 * record)
    with pytest.raises(BagError, match=r"a\.bag.*again and again"):
        BagReader(bag, partial=True)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "bz2"])
def test_what_grows_beyond_its_claim_is_refused_before_it_fills_the_memory(codec: str) -> None:
    import bz2

    import lz4.frame

    pack = {"zstd": zstd.compress, "lz4": lz4.frame.compress, "bz2": bz2.compress}[codec]
    bomb = pack(bytes(50 * 2**20))
    tracemalloc.start()
    with pytest.raises(BrokenMessage, match="more than the 1000 bytes"):
        decompressed(bomb, codec, 1000)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert decompressed(pack(bytes(1000)), codec, 1000) == bytes(1000), "exactly the limit is no bomb"
    with pytest.raises(BrokenMessage):
        decompressed(pack(bytes(range(256)) * 4)[:-3], codec, 10_000)


def test_a_compressed_file_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bag"
    folder.mkdir()
    (folder / "bag.mcap.zstd").write_bytes(zstd.compress(bytes(2**28)))
    with pytest.raises(BagError, match="times its size"):
        BagReader(folder)


def test_unpacking_stops_where_the_disk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4 * 2**20, dtype=np.uint8).tobytes()
    (tmp_path / "bag.mcap.zstd").write_bytes(zstd.compress(noise))
    monkeypatch.setattr(compression, "SPARE_BYTES", shutil.disk_usage(tmp_path).free - 2**20)
    with pytest.raises(BagError, match="does not fit"):
        unpack_file(tmp_path / "bag.mcap.zstd", tmp_path / "bag.mcap")


def test_absurd_lengths_in_an_mcap_are_not_allocated(tmp_path: Path) -> None:
    file = write_mcap(tmp_path / "bag.mcap", stream(4), McapShape(end=False))
    file.write_bytes(file.read_bytes() + struct.pack("<BQ", 5, 2**63) + bytes(50))
    assert len(contents(file, partial=True)) == 8
    assert MAX_BYTES < 2**30


def test_a_blob_beyond_the_limit_is_refused_by_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ukd_ros.data.rosbag.sqlite as module

    bag = write_ros2(tmp_path / "bag", stream(4), "sqlite3")
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    assert {topic for topic, _, _ in contents(bag, partial=True)} == {"/camera/camera_info"}


def test_a_database_is_not_trusted(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(3), "sqlite3")
    with sqlite3.connect(lone(bag)) as base:
        base.execute("UPDATE messages SET timestamp = 'late' WHERE id = 1")
        base.execute("UPDATE messages SET data = 'text' WHERE id = 2")
        base.execute("UPDATE messages SET timestamp = 9223372036854775807 WHERE id = 3")
        base.execute("UPDATE topics SET serialization_format = 'json' WHERE id = 1")
    base.close()
    with BagReader(bag, partial=True) as reader:
        assert len(list(reader.messages())) == 3
        assert reader.topics["/camera/camera_info"].endswith("(json)")
    with sqlite3.connect(lone(bag)) as base:
        base.execute("ALTER TABLE messages RENAME TO hidden")
        base.execute("CREATE VIEW messages AS SELECT * FROM hidden")
    base.close()
    with pytest.raises(BagError, match="no tables"):
        BagReader(bag)


@pytest.mark.parametrize("suffix", [".mcap", ".db3", ".bag"])
@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(5000), *MAGICS])
def test_files_that_are_no_bags_are_errors_that_name_them(suffix: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    with pytest.raises(BagError, match="bad") as said:
        BagReader(file)
    assert str(said.value).count("cannot be read") <= 1 and ("is empty" in str(said.value)) == (content == b"")


def test_a_folder_of_bags_names_them(tmp_path: Path) -> None:
    write_ros2(tmp_path / "monday", stream(1))
    write_ros1(tmp_path / "tuesday.bag", stream(1, ros1=True))
    (tmp_path / "notes").mkdir()
    with pytest.raises(BagError, match="folder of bags.*/monday, .*/tuesday.bag") as said:
        BagReader(tmp_path)
    assert "notes" not in str(said.value)


@pytest.mark.parametrize("kind", ["mcap", "sqlite", "ros1"])
def test_random_damage_never_escapes_as_another_error(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    small = [m for m in stream(6) if m.topic != IMAGES]
    if kind == "ros1":
        file = write_ros1(tmp_path / "a.bag", [m for m in stream(6, ros1=True) if m.topic != IMAGES], "lz4")
    else:
        file = lone(write_ros2(tmp_path / "a", small, "mcap" if kind == "mcap" else "sqlite3"))
    data = file.read_bytes()
    for _ in range(150):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 6):
            broken[at] = rng.integers(0, 256)
        file.write_bytes(bytes(broken))
        try:
            with BagReader(file, partial=True) as bag:
                for message in bag.messages():
                    try:
                        message.decoded()
                    except BagError:
                        continue
        except BagError:
            continue


def test_bytes_of_no_message_are_a_bag_error_whatever_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    from ukd_ros.data.rosbag.message_types import BagMessage, store

    types = store().types
    header = types["std_msgs/msg/Header"](stamp=types["builtin_interfaces/msg/Time"](sec=1, nanosec=0), frame_id="a")
    kind = "vision_msgs/msg/Detection3DArray"
    good = packed(kind, types[kind](header=header, detections=[]))
    assert BagMessage("/d", kind, 0, good).decoded().header.frame_id == "a"
    for _ in range(200):
        data = good[:4] + rng.integers(0, 256, 60, dtype=np.uint8).tobytes()
        try:
            BagMessage("/d", kind, 0, data).decoded()
        except BagError:
            continue
