# SPDX-License-Identifier: Apache-2.0
"""What no honest recorder writes, and disks that are full for now: a sentence or a warning, never wrong images."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from data.rosbag.making import START, Recorded, painting, stream, write_mcap, write_ros2

from ukd_ros.data.bags import BagError, BagReader
from ukd_ros.data.bop import BopDataset
from ukd_ros.data.rosbag import compression, reader
from ukd_ros.data.rosbag.compression import zstd
from ukd_ros.data.rosbag.frames import BagOptions, bags_to_bop
from ukd_ros.data.rosbag.info import bag_info
from ukd_ros.data.rosbag.mcap import McapFile
from ukd_ros.data.rosbag.sqlite import SqliteFile
from ukd_ros.data.rosbag.storage import Places, Storage

IMAGES = "/camera/image_raw"
EVERY_FRAME = BagOptions(held_out=0.0, min_change=0.0)


def parts(folder: Path, counts: tuple[int, ...], packed: bool = False) -> Path:
    """Write a bag of several mcap files, of so many images each, one going on where the last ended."""
    folder.mkdir()
    for number, count in enumerate(counts):
        file = write_mcap(folder / f"bag_{number}.mcap", stream(count, first=sum(counts[:number])))
        if packed:
            file.with_suffix(".mcap.zstd").write_bytes(zstd.compress(file.read_bytes()))
            file.unlink()
    return folder


def database(bag: Path, script: str) -> Path:
    """Run an SQL script on the database of a bag's folder."""
    (file,) = bag.glob("*.db3")
    with sqlite3.connect(file) as base:
        base.executescript(script)
    base.close()
    return bag


# ---- what cannot be opened for now -------------------------------------------------------------------------------


def test_a_disk_too_full_to_unpack_is_no_damage_and_nothing_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = parts(tmp_path / "bag", (4, 30), packed=True)
    room = SimpleNamespace(free=compression.SPARE_BYTES + 800_000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: room)
        for read in (lambda: bag_info(bag), lambda: bags_to_bop([bag], tmp_path / "out", EVERY_FRAME, progress=False)):
            with pytest.raises(BagError, match="bag_1.mcap.zstd: unpacked it does not fit"):
                read()
    report = bags_to_bop([bag], tmp_path / "out", EVERY_FRAME, progress=False)
    assert report.train == 34 and not report.bags[0].damage


def test_a_file_that_the_system_refuses_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = parts(tmp_path / "bag", (2, 2))

    def refusing(path: Path) -> Storage:
        if path.name == "bag_0.mcap":
            raise PermissionError(13, "Permission denied", str(path))
        return McapFile(path)

    monkeypatch.setitem(reader.STORAGES, ".mcap", refusing)
    with pytest.raises(BagError, match=r"bag_0\.mcap: this bag cannot be read: .*Permission denied"):
        BagReader(bag, partial=True)


def test_a_database_that_the_system_refuses_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = write_ros2(tmp_path / "bag", stream(2), "sqlite3")

    def refusing(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refusing)
    with pytest.raises(BagError, match=r"\.db3: this bag cannot be read: unable to open"):
        BagReader(bag, partial=True)


def test_a_file_of_nonsense_is_lost_with_all_its_bytes(tmp_path: Path) -> None:
    bag = parts(tmp_path / "bag", (3, 3), packed=True)
    nonsense = bag / "bag_1.mcap.zstd"
    nonsense.write_bytes(zstd.compress(np.random.default_rng(0).bytes(5000)))
    with BagReader(bag, partial=True) as opened:
        assert opened.counts[IMAGES] == 3
        assert opened.lost_bytes == nonsense.stat().st_size > 5000
        assert opened.lost_bytes < opened.size
        assert len(opened.damage) == 1 and opened.damage[0].startswith("bag_1.mcap.zstd: ")


def test_messages_keep_their_places_where_another_file_becomes_readable(tmp_path: Path) -> None:
    bag = parts(tmp_path / "bag", (3, 3))
    first = bag / "bag_0.mcap"
    whole = first.read_bytes()
    first.write_bytes(b"nonsense")
    with BagReader(bag, partial=True) as opened:
        index = opened.index([IMAGES])
        noted = [index[number] for number in range(len(index))]
        data = [opened.read(entry).data for entry in noted]
    first.write_bytes(whole)
    with BagReader(bag, partial=True) as opened:
        assert [opened.read(entry).data for entry in noted] == data and len(data) == 3
    first.write_bytes(b"nonsense")
    bags_to_bop([bag], tmp_path / "out", EVERY_FRAME, progress=False)
    images = BopDataset(tmp_path / "out", split="train")
    for number in range(3):
        np.testing.assert_array_equal(images.image(number), painting(3 + number))


# ---- mcap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [2**63 + 5, 2**64 - 20])
def test_an_index_that_points_before_its_chunk_costs_that_message(offset: int, tmp_path: Path) -> None:
    file = write_mcap(tmp_path / "bag.mcap", stream(2))
    data = bytearray(file.read_bytes())
    at = data.rindex(struct.pack("<Q", START)) + 8  # the last record that has this time is the index of the images
    struct.pack_into("<Q", data, at, offset)
    file.write_bytes(bytes(data))
    with BagReader(file, partial=True) as opened:
        assert len(opened.index([IMAGES])) == 1 and len(list(opened.messages())) == 3
        assert opened.damage == ["bag.mcap: the index of 1 messages points outside of the file; left out."]
    assert "points outside" in bag_info(file).text()
    with pytest.raises(BagError, match="damaged.*points outside"):
        list(BagReader(file).messages())


# ---- metadata.yaml and links -------------------------------------------------------------------------------------

BOMBS = {
    "nested": ["- " * 60 + "x", "a: " + "[" * 20_000 + "]" * 20_000, "{a: " * 60 + "1" + "}" * 60],
    "characters": ["a: 1" + ":1" * 3000, 'a: !!int "1' + ":1" * 3000 + '"', "x" * 5000],
}


@pytest.mark.parametrize(("said", "text"), [(said, text) for said, texts in BOMBS.items() for text in texts])
def test_metadata_that_cost_more_than_their_bytes_are_not_used(said: str, text: str, tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(1))
    (bag / "metadata.yaml").write_text(text)
    with BagReader(bag) as opened:
        assert opened.counts[IMAGES] == 1
        assert any("ValueError" in warning and said in warning for warning in opened.warnings), opened.warnings


def test_long_texts_in_metadata_are_no_bomb(tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(1))
    file = bag / "metadata.yaml"
    content = yaml.safe_load(file.read_text())
    about = content["rosbag2_bagfile_information"]
    about["message_count"] = 77
    about["topics_with_message_count"][0]["topic_metadata"]["offered_qos_profiles"] = "- depth: 1\n" * 5000
    file.write_text(yaml.safe_dump(content))
    assert any("77 messages" in warning for warning in bag_info(bag).warnings), "it was understood"


@pytest.mark.parametrize("target", ["loop.mcap", "nowhere.mcap"])
def test_a_link_to_itself_or_nowhere_is_not_followed(target: str, tmp_path: Path) -> None:
    bag = write_ros2(tmp_path / "bag", stream(3))
    (bag / "loop.mcap").symlink_to(target)
    with BagReader(bag) as opened:
        assert opened.counts[IMAGES] == 3
        assert any("loop.mcap" in warning and "nowhere; not followed" in warning for warning in opened.warnings)


# ---- topics and databases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["std_msgs/msg/String", ""])
@pytest.mark.parametrize("number", [0, 4])
def test_a_topic_is_of_one_type(kind: str, number: int, tmp_path: Path) -> None:
    folder = parts(tmp_path / "bag", (4,))
    (folder / "bag_0.mcap").rename(folder / "bag_3.mcap")
    write_mcap(folder / f"bag_{number}.mcap", [Recorded(IMAGES, kind, START + n, b"\0\1\0\0" * 3) for n in range(2)])
    image = number == 4 or not kind  # a type that was lost is not the topic's, even where it comes first
    with BagReader(folder) as opened:
        assert opened.topics[IMAGES] == ("sensor_msgs/msg/Image" if image else kind)
        assert opened.counts[IMAGES] == len(opened.index([IMAGES])) == (4 if image else 2)
        assert len({m.kind for m in opened.messages([IMAGES])}) == 1
        count = 2 if image else 4
        assert any(f"{count} messages of {IMAGES} are" in w and "left out" in w for w in opened.warnings)
    if image:
        assert bags_to_bop([folder], tmp_path / "out", EVERY_FRAME, progress=False).train == 4


COPIED = (
    "INSERT INTO m2(id, topic_id, timestamp{0}) SELECT id, {1}, timestamp{0} FROM messages; DROP TABLE messages; "
    "ALTER TABLE m2 RENAME TO messages;"
)


def test_rows_whose_topic_or_number_is_no_whole_number_are_left_out(tmp_path: Path) -> None:
    made = "CREATE TABLE m2(id INTEGER PRIMARY KEY, topic_id, timestamp INTEGER, data BLOB);"
    some = "CASE WHEN id < 3 THEN topic_id * 1.0 ELSE topic_id END"
    bag = database(write_ros2(tmp_path / "a", stream(3), "sqlite3"), made + COPIED.format(", data", some))
    with BagReader(bag, partial=True) as opened:
        assert len(list(opened.messages())) == sum(opened.counts.values()) == 4
    bag = database(write_ros2(tmp_path / "b", stream(3), "sqlite3"), "ALTER TABLE messages ADD COLUMN rowid;")
    with BagReader(bag, partial=True) as opened:
        assert list(opened.messages()) == [] and sum(opened.counts.values()) == 0


@pytest.mark.parametrize("stored", ["VIRTUAL", "STORED"])
def test_a_database_that_computes_its_columns_is_refused(stored: str, tmp_path: Path) -> None:
    made = (
        "CREATE TABLE m2(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, "
        f"data BLOB GENERATED ALWAYS AS (cast(hex(zeroblob(4000)) as blob)) {stored});"
    )
    bag = database(write_ros2(tmp_path / "bag", stream(3), "sqlite3"), made + COPIED.format("", "topic_id"))
    with pytest.raises(BagError, match="compute columns"):
        BagReader(bag, partial=True)


def test_info_looks_at_a_database_as_often_whatever_its_topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[set[int]] = []
    places = SqliteFile.places

    def counted(self: SqliteFile, channels: set[int]) -> Places:
        scans.append(channels)
        return places(self, channels)

    monkeypatch.setattr(SqliteFile, "places", counted)
    often = []
    for topics in (2, 20):
        others = [Recorded(f"/t{n % topics}", "std_msgs/msg/String", START + n * 10**8, b"") for n in range(2 * topics)]
        found = bag_info(write_ros2(tmp_path / f"bag{topics}", [*stream(11), *others], "sqlite3"))
        often.append(len(scans))
        scans.clear()
        rates = {row.topic: row.rate_hz for row in found.topics}
        assert rates[IMAGES] == pytest.approx(10) and rates["/t0"] == pytest.approx(10 / topics)
    assert often[0] == often[1] < 10


def test_times_by_topic_are_those_of_the_topic_over_all_files(tmp_path: Path) -> None:
    bag = parts(tmp_path / "bag", (3, 4))
    with BagReader(bag) as opened:
        times = opened.times_by_topic(opened.index())
        assert set(times) == set(opened.topics)
        for topic, found in times.items():
            np.testing.assert_array_equal(np.sort(found), opened.index([topic]).times_ns)
        assert opened.times_by_topic(opened.index([])) == {}
