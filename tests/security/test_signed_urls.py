"""What opens a URL is used to ask, and is no part of a name: not of a plan, a part's id, a key or a message."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from img2parquet.dataset.commit import Output
from img2parquet.dataset.plan import Plan, make_plan
from img2parquet.engine.driver import run
from img2parquet.errors import Img2ParquetError, InputError, JobFailed
from img2parquet.job import JobSpec, parse_job
from img2parquet.read import PartLimits
from img2parquet.read.table import Table
from img2parquet.read.webdataset import WebDataset
from img2parquet.results.reader import open_results
from img2parquet.results.verify import find_problems
from img2parquet.storage.uri_secrets import UriSecrets, given, name_of
from tests.read.test_table import read
from tests.security.servers import Answer, web
from tests.support.small_job import job_dict, jpeg, make_checkpoint, make_shards

SECRETS = [
    ("https://u:PW@h/a?x=1", "https://h/a?x=1"),
    ("https://h/a.tar?X-Amz-Algorithm=a&X-Amz-Credential=c&X-Amz-Signature=S&X-Amz-Date=d", "https://h/a.tar"),
    ("https://h/a.tar?versionId=7&X%2DAmz%2DSignature=S", "https://h/a.tar?versionId=7"),
    ("https://h/a?AWSAccessKeyId=A&Signature=S&Expires=9", "https://h/a"),
    ("https://h/a?GoogleAccessId=A&Signature=S&Expires=9&generation=3", "https://h/a?generation=3"),
    ("https://h/a?Policy=p&Signature=S&Key-Pair-Id=k", "https://h/a"),
    ("https://h/c/a?sv=2024&ss=b&srt=o&sp=r&se=9&st=1&spr=https&sig=S", "https://h/c/a"),
    ("https://h/a?sp=1&st=2", "https://h/a?sp=1&st=2"),
    ("https://h/a?id=5&token=T", "https://h/a?id=5"),
    ("https://h/a?access_token=T&api_key=K&apikey=K&auth=A&password=P&jwt=J&hdnts=exp~hmac", "https://h/a"),
    ("https://h/a#access_token=T&state=1", "https://h/a#state=1"),
    ("https://h/a?design=1&monkey=2&author=me#top", "https://h/a?design=1&monkey=2&author=me#top"),
    ("https://h/a?", "https://h/a?"),
    ("https://h/a?b&&c=%20", "https://h/a?b&&c=%20"),
    ("sftp://u:PW@h/a*.jpg", "sftp://h/a*.jpg"),
    ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
    ("s3://b/a?token=part of the name", "s3://b/a?token=part of the name"),
    ("/a/b?token=part of the name", "/a/b?token=part of the name"),
]


@pytest.mark.parametrize(("uri", "name"), SECRETS)
def test_names(uri: str, name: str) -> None:
    assert name_of(uri) == name
    assert name_of(name) == name


def test_a_parameter_that_may_be_a_name_or_a_secret_is_told_apart_and_not_told() -> None:
    one, other = name_of("https://h/a?key=AIzaSECRET"), name_of("https://h/a?key=photo.jpg")
    assert one != other
    assert "SECRET" not in one and one == name_of("https://h/a?key=AIzaSECRET")


@pytest.mark.parametrize(("uri", "name"), [pair for pair in SECRETS if "*" not in pair[0]])
def test_a_name_finds_its_address(uri: str, name: str) -> None:
    assert given([uri]).address_of(name) == uri


def test_what_lies_beside_a_file_with_a_login_is_asked_for_with_it() -> None:
    known = given(["https://u:PW@h/list.csv"])
    assert known.address_of("https://h/a.jpg") == "https://u:PW@h/a.jpg"
    assert known.address_of("https://h.evil/a.jpg") == "https://h.evil/a.jpg"
    assert known.address_of("http://h/a.jpg") == "http://h/a.jpg"
    assert UriSecrets().address_of("https://h/a") == "https://h/a"


def test_two_secrets_for_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"https://h/a is named twice") as told:
        given(["https://h/a?token=ONE", "https://h/a?token=TWO"])
    assert "ONE" not in str(told.value) and "TWO" not in str(told.value)


def test_settings_show_names_and_travel_with_addresses() -> None:
    source = WebDataset(uris=("https://u:PW@h/{0..1}.tar?x=1&sig=S3CRET",))
    for shown in (repr(source), str(source), str(source.model_dump()), source.model_dump_json(), repr(source.store)):
        assert "S3CRET" not in shown and "PW" not in shown
    there = pickle.loads(pickle.dumps(source))
    assert there.store.given.address_of("https://h/1.tar?x=1") == "https://u:PW@h/1.tar?x=1&sig=S3CRET"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    make_checkpoint(folder / "checkpoint")
    make_shards(folder / "in", shards=2, per_shard=4, broken=False)
    return folder


def job_of(made: Path, output: Path, site: str, signature: str) -> JobSpec:
    document = job_dict("unused", made / "checkpoint", str(output))
    document["input"]["uris"] = [f"{site}/{{000..001}}.tar?id=5&X-Amz-Signature={signature}"]
    return parse_job(document)


def test_a_job_goes_on_with_urls_that_were_signed_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signature ends between the plan and the second shard; only the new one is asked with after that."""
    accepted = {"/000.tar": {"FIRST"}, "/001.tar": {"FIRST"}}

    def answer(target: str) -> Answer:
        parts = urlsplit(target)
        if parse_qs(parts.query)["X-Amz-Signature"][0] not in accepted[parts.path]:
            return Answer(403, b"Request has expired")
        return Answer(body=(made / "in" / parts.path[1:]).read_bytes(), headers={"ETag": f'"{parts.path}"'})

    def plan_then_expire(*arguments: Any) -> Plan:
        plan = make_plan(*arguments)
        accepted["/001.tar"] = set()
        return plan

    output = Output.at(str(tmp_path / "out"))
    monkeypatch.setattr("img2parquet.engine.driver.make_plan", plan_then_expire)
    with web(answer) as site:
        with pytest.raises(JobFailed, match=r"(?s)part 1: .*access denied.*get a new URL") as told:
            run(job_of(made, tmp_path / "out", site.url, "FIRST"), "local")
        assert "FIRST" not in str(told.value)
        first, accepted["/001.tar"] = output.stored_plan(), {"SECOND"}
        site.asked.clear()
        summary = run(job_of(made, tmp_path / "out", site.url, "SECOND"), "local")
    assert site.asked and all("001.tar" in target and "SECOND" in target for target in site.asked)
    assert (summary.parts, summary.parts_done_before) == (2, 1)
    assert output.stored_plan() == first
    assert find_problems(output) == []
    shards = set(open_results(str(tmp_path / "out")).to_table().column("shard").to_pylist())
    assert shards == {f"{site.url}/000.tar?id=5", f"{site.url}/001.tar?id=5"}


def test_a_new_signature_gives_the_same_parts(made: Path, tmp_path: Path) -> None:
    with web(lambda target: Answer(body=b"a tar", headers={"ETag": '"1"'})) as site:
        plans = []
        for signature in ("ONE", "TWO"):
            job = job_of(made, tmp_path, site.url, signature)
            plans.append(list(job.input.plan(PartLimits())))
        other = job_of(made, tmp_path, site.url + "/elsewhere", "ONE")
        assert plans[0] == plans[1] != list(other.input.plan(PartLimits()))


def test_rows_of_a_list_are_named_without_their_signatures(tmp_path: Path) -> None:
    with web(lambda target: Answer(body=jpeg(1)) if "sig=GOOD" in target else Answer(404)) as site:
        urls = [f"{site.url}/a.jpg?v=1&sig=GOOD", f"{site.url}/b.jpg?v=1&sig=BAD"]
        (tmp_path / "list.csv").write_text("uri\n" + "\n".join(urls) + "\n")
        allowed = {"http": {"allow_private_addresses": True}}
        row, reject = read(Table(uris=(f"{tmp_path}/list.csv",), keep=("uri",), storage_options=allowed))
    assert row.key == f"{site.url}/a.jpg?v=1"
    assert row.passthrough == {"uri": row.key}  # type: ignore[union-attr]
    assert reject.key == f"{site.url}/b.jpg?v=1"
    assert "BAD" not in str(reject)


def test_an_output_may_not_hold_a_secret_in_its_name(made: Path) -> None:
    document = job_dict(f"{made}/in/*.tar", made / "checkpoint", "az://container/out?sig=S3CRET")
    with pytest.raises(Img2ParquetError, match=r"output\.uri: .*environment") as told:
        parse_job(document)
    assert "S3CRET" not in str(told.value)
