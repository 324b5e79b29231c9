"""The manifests, rendered as `kubectl apply -k` would: valid, agreeing with the service, and locked down."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.settings import PREFIX, Settings
from tests.conftest import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
README = REPOSITORY / "deploy" / "README.md"
# The oldest release the manifests claim to run on, and the newest known.
VERSIONS = ("1.29", kubernetes_validate.latest_version().removesuffix(".0"))
KINDS = {
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "Service",
}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

Documents = dict[str, dict[str, Any]]


def render(folder: Path) -> Documents:
    """Kind -> document; the manifests hold one of each."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl (Debian package kubernetes-client)")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert len({document["kind"] for document in documents}) == len(documents)
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def base() -> Documents:
    return render(KUBERNETES / "base")


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """The overlay that deploy/README.md spells out."""
    copy = tmp_path_factory.mktemp("overlay") / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    blocks = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    folder = copy / "overlays" / "postgres"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(blocks[0])
    return render(folder)


@pytest.fixture
def settings(base: Documents, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service makes of the ConfigMap."""
    for name, value in base["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOTTO_API_KEYS", json.dumps([{"name": "test", "sha256": "0" * 64}]))
    return Settings()


def pod(documents: Documents) -> dict[str, Any]:
    return documents["Deployment"]["spec"]["template"]["spec"]


def container(documents: Documents) -> dict[str, Any]:
    (only,) = pod(documents)["containers"]
    return only


def probe(documents: Documents, name: str) -> dict[str, Any]:
    return container(documents)[name]


def test_the_base_holds_what_it_should(base: Documents) -> None:
    assert set(base) == KINDS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_document_is_valid(base: Documents, kind: str, version: str) -> None:
    assert kubernetes_validate.validate(base[kind], version, strict=True) == version


def test_every_setting_exists(base: Documents) -> None:
    names = {*base["ConfigMap"]["data"], *(entry["name"] for entry in container(base)["env"])}
    assert names <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_the_settings_parse_and_listen_outside_the_pod(settings: Settings) -> None:
    assert settings.host == "0.0.0.0"


def test_the_pod_reads_the_generated_settings(base: Documents) -> None:
    assert container(base)["envFrom"] == [{"configMapRef": {"name": base["ConfigMap"]["metadata"]["name"]}}]


def test_no_secret_is_in_the_manifests(base: Documents) -> None:
    (keys,) = (entry for entry in container(base)["env"] if entry["name"] == "SOTTO_API_KEYS")
    assert keys["valueFrom"] == {"secretKeyRef": {"name": "sotto-api-keys", "key": "SOTTO_API_KEYS"}}


def test_the_readme_makes_the_secret_that_the_pod_reads() -> None:
    command = r"kubectl create secret generic sotto-api-keys [^`]*--from-literal=SOTTO_API_KEYS='(.*)'"
    found = re.search(command, README.read_text())
    assert found
    assert set(json.loads(found[1])[0]) == {"name", "sha256", "scopes"}


def test_no_service_links_reach_the_settings(base: Documents) -> None:
    """A Service named `sotto` would add SOTTO_PORT=tcp://... to the environment."""
    assert pod(base)["enableServiceLinks"] is False


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_asks_a_route_of_the_service(base: Documents, name: str) -> None:
    assert probe(base, name)["httpGet"]["path"] in create_app(Settings()).openapi()["paths"]


def test_only_readiness_depends_on_the_database(base: Documents) -> None:
    paths = [probe(base, name)["httpGet"]["path"] for name in PROBES]
    assert paths == ["/healthz", "/readyz", "/healthz"]


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_asks_the_named_port(base: Documents, name: str) -> None:
    assert probe(base, name)["httpGet"]["port"] in {port["name"] for port in container(base)["ports"]}


def test_the_container_port_is_the_one_listened_on(base: Documents, settings: Settings) -> None:
    assert [port["containerPort"] for port in container(base)["ports"]] == [settings.port]


def test_the_service_leads_to_the_container_port(base: Documents) -> None:
    assert [port["targetPort"] for port in base["Service"]["spec"]["ports"]] == ["http"]


def test_prometheus_is_sent_to_the_metrics(base: Documents, settings: Settings) -> None:
    annotations = base["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(settings.port),
        "prometheus.io/path": "/metrics",
    }


def test_the_metrics_are_a_route_of_the_service() -> None:
    assert "/metrics" in create_app(Settings()).openapi()["paths"]


def test_every_selector_matches_the_pod(base: Documents) -> None:
    selectors = [
        base["Deployment"]["spec"]["selector"]["matchLabels"],
        base["Service"]["spec"]["selector"],
        base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in pod(base)["topologySpreadConstraints"]),
    ]
    labels = base["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)


def test_the_autoscaler_scales_the_deployment(base: Documents) -> None:
    deployment = base["Deployment"]
    assert base["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_sqlite_is_never_scaled(base: Documents) -> None:
    assert base["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] == 1


def test_only_the_autoscaler_sets_the_replicas(base: Documents) -> None:
    assert "replicas" not in base["Deployment"]["spec"]


def test_a_rollout_never_has_two_pods_on_sqlite(base: Documents) -> None:
    assert base["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


def test_the_volume_admits_one_pod(base: Documents) -> None:
    assert base["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_a_node_with_the_only_replica_can_be_drained(base: Documents) -> None:
    budget = base["PodDisruptionBudget"]["spec"]
    assert (budget.get("maxUnavailable"), budget.get("minAvailable")) == (1, None)


def test_the_profiles_are_on_the_volume(base: Documents, settings: Settings) -> None:
    volumes = {volume["name"]: volume for volume in pod(base)["volumes"]}
    (mount,) = (mount for mount in container(base)["volumeMounts"] if mount["mountPath"] == str(settings.data_dir))
    claim = volumes[mount["name"]]["persistentVolumeClaim"]["claimName"]
    assert claim == base["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_pod_meets_the_restricted_standard(base: Documents) -> None:
    context = pod(base)["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["seccompProfile"]) == (
        True,
        10001,
        {"type": "RuntimeDefault"},
    )


def test_the_volume_is_the_users_group(base: Documents) -> None:
    context = pod(base)["securityContext"]
    assert context["fsGroup"] == context["runAsGroup"] == 10001


def test_the_container_cannot_gain_or_write_anything(base: Documents) -> None:
    assert container(base)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_pod_holds_no_token_of_the_cluster(base: Documents) -> None:
    assert pod(base)["automountServiceAccountToken"] is False


def test_cpu_and_memory_are_bounded(base: Documents) -> None:
    assert set(container(base)["resources"]["limits"]) == {"cpu", "memory"}


def test_readiness_fails_before_the_drain_begins(base: Documents, settings: Settings) -> None:
    readiness = probe(base, "readinessProbe")
    assert settings.shutdown_delay_s > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_the_pod_is_not_killed_before_it_has_drained(base: Documents, settings: Settings) -> None:
    """Connections have the grace to finish, and then the queue has it once more."""
    longest_s = settings.shutdown_delay_s + 2 * settings.shutdown_grace_s
    assert pod(base)["terminationGracePeriodSeconds"] > longest_s


@pytest.mark.parametrize("kind", sorted(KINDS - {"PersistentVolumeClaim"}))
def test_a_document_of_the_overlay_is_valid(overlay: Documents, kind: str) -> None:
    assert kubernetes_validate.validate(overlay[kind], VERSIONS[0], strict=True) == VERSIONS[0]


def test_the_overlay_scales(overlay: Documents) -> None:
    assert overlay["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] > 1


def test_replicas_of_the_overlay_share_no_volume(overlay: Documents) -> None:
    assert all("emptyDir" in volume and len(volume) == 2 for volume in pod(overlay)["volumes"])


def test_the_overlay_leaves_no_claim_behind(overlay: Documents) -> None:
    assert "PersistentVolumeClaim" not in overlay


def test_the_overlay_keeps_serving_in_a_rollout(overlay: Documents) -> None:
    assert overlay["Deployment"]["spec"]["strategy"] == {"type": "RollingUpdate"}


def test_the_overlay_adds_the_database_to_the_keys(overlay: Documents) -> None:
    assert {entry["name"] for entry in container(overlay)["env"]} == {"SOTTO_API_KEYS", "SOTTO_DATABASE_URL"}
