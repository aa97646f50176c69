"""The files for chief and workers hold to the schemas of Compose and Kubernetes, and agree with each other and with KerasTuner."""

import copy
import importlib.util
import json
import pathlib
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

FOLDER = pathlib.Path(__file__).parent.parent / "deploy"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
PORT, IP, NAME = "KERASTUNER_ORACLE_PORT", "KERASTUNER_ORACLE_IP", "KERASTUNER_TUNER_ID"


def manifest(kind, name):
    (found,) = [one for one in MANIFESTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def container(job):
    (found,) = manifest("Job", job)["spec"]["template"]["spec"]["containers"]
    return found


def environment(job):
    return {one["name"]: one.get("value") for one in container(job)["env"]}


def check_compose(content):
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validators.validator_for(schema)(schema).validate(content)


def test_the_compose_file_holds_to_the_specification_which_knows_errors():
    check_compose(COMPOSE)
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["worker"]["enviroment"] = {}
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        check_compose(wrong)


@pytest.mark.parametrize("content", MANIFESTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_manifests_hold_to_the_schema_of_kubernetes_which_knows_errors(content):
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(content, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(content | {"spek": {}}, version, strict=True)


def test_compose_gives_every_process_what_keras_tuner_needs():
    chief, worker = COMPOSE["services"]["chief"], COMPOSE["services"]["worker"]
    assert chief["environment"][NAME] == "chief"
    assert worker["environment"][IP] == "chief"  # by the name of the service
    assert chief["environment"][PORT] == worker["environment"][PORT]
    (name,) = re.findall(rf"{NAME}=(\S+) exec python search.py", worker["command"][-1])
    assert name == "tuner-$$(hostname)"  # $$ is Compose's way to write $
    assert (chief["restart"], worker["restart"]) == ("no", "on-failure")
    for one in (chief, worker):
        assert one["volumes"] == [f"searches:{one['environment']['SEARCH_FOLDER']}"]
        assert (FOLDER / one["build"]["context"] / one["build"]["dockerfile"]).resolve() == (FOLDER / "Dockerfile").resolve()
    assert "searches" in COMPOSE["volumes"]


def test_kubernetes_gives_every_process_what_keras_tuner_needs():
    service = manifest("Service", "keras-kd-chief")["spec"]
    chief, worker = environment("keras-kd-chief"), environment("keras-kd-workers")
    labels = manifest("Job", "keras-kd-chief")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels != manifest("Job", "keras-kd-workers")["spec"]["template"]["metadata"]["labels"]
    assert (chief[NAME], worker[NAME], worker[IP]) == ("chief", "tuner$(INDEX)", "keras-kd-chief")
    (port,) = service["ports"]
    assert str(port["port"]) == str(port["targetPort"]) == chief[PORT] == worker[PORT]
    names = [one["name"] for one in container("keras-kd-workers")["env"]]
    assert names.index("INDEX") < names.index(NAME)  # Kubernetes knows what stands before
    workers = manifest("Job", "keras-kd-workers")["spec"]
    assert workers["completionMode"] == "Indexed"
    assert workers["completions"] == workers["parallelism"]  # all at once: none waits for another's end


def test_all_pods_share_one_volume_that_several_nodes_can_write_to():
    claim = manifest("PersistentVolumeClaim", "keras-kd-searches")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for job in ("keras-kd-chief", "keras-kd-workers"):
        pod = manifest("Job", job)["spec"]["template"]["spec"]
        assert pod["volumes"] == [{"name": "searches", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}]
        assert container(job)["volumeMounts"] == [{"name": "searches", "mountPath": environment(job)["SEARCH_FOLDER"]}]


def test_the_image_holds_what_it_is_built_from():
    text = (FOLDER / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert "deploy/search.py" in sources
    assert [name for name in sources if not (FOLDER.parent / name).exists()] == []
    sent = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted(sources)


def test_the_script_searches_on_one_machine_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_FOLDER", str(tmp_path))
    monkeypatch.setenv("SEARCH_EPOCHS", "1")
    for name in (NAME, IP, PORT):
        monkeypatch.delenv(name, raising=False)
    for trials in (1, 2):
        monkeypatch.setenv("SEARCH_TRIALS", str(trials))
        spec = importlib.util.spec_from_file_location("deployed_search", FOLDER / "search.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module.kd_tuner.CompressionHyperModel, "default_search", {"learning_rate": (1e-3, 1e-2)})
        tuner = module.main()
        assert [trial.status for trial in tuner.oracle.trials.values()] == ["COMPLETED"] * trials
    assert len(list((tmp_path / "digits").glob("trial_*/student.tflite"))) == 2
    assert json.loads((tmp_path / "digits" / "oracle.json").read_text())["ongoing_trials"] == {}
