"""Volumes of the cluster's default class: a folder of the node for each claim, removed with it."""

import shutil
from pathlib import Path
from typing import Any

from infra.apply.client import ApiError, Cluster

Json = dict[str, Any]
PROVISIONER = "slipway.dev/folder"
"""As in addons/storage.yaml."""
FOLDER = Path("/var/lib/volumes")
CONFLICT = 409


def provide(cluster: Cluster) -> None:
    """Make a volume for each claim that waits for one, and remove those whose claim is gone."""
    classes = cluster.get("/apis/storage.k8s.io/v1/storageclasses", resourceVersion="0")["items"]
    ours = {one["metadata"]["name"] for one in classes if one["provisioner"] == PROVISIONER}
    for claim in cluster.get("/api/v1/persistentvolumeclaims", resourceVersion="0")["items"]:
        if claim["spec"].get("storageClassName") in ours and not claim["spec"].get("volumeName"):
            _make(cluster, claim)
    for volume in cluster.get("/api/v1/persistentvolumes", resourceVersion="0")["items"]:
        made_here = volume["metadata"].get("annotations", {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
        if made_here and volume.get("status", {}).get("phase") == "Released":
            shutil.rmtree(FOLDER / volume["metadata"]["name"], ignore_errors=True)
            cluster.delete({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": volume["metadata"]})


def volume_for(claim: Json) -> Json:
    """The PersistentVolume of a claim. It is not measured: the folder can hold what the disk can."""
    metadata, spec = claim["metadata"], claim["spec"]
    name = f"pvc-{metadata['uid']}"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        # Says whose it is to remove: Kubernetes itself would fail at it.
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "accessModes": spec["accessModes"],
            "capacity": spec["resources"]["requests"],
            "storageClassName": spec["storageClassName"],
            "persistentVolumeReclaimPolicy": "Delete",
            "hostPath": {"path": str(FOLDER / name), "type": "Directory"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
        },
    }


def _make(cluster: Cluster, claim: Json) -> None:
    volume = volume_for(claim)
    folder = FOLDER / volume["metadata"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    # kubelet gives a node's folder to no group: whichever user the pod runs as writes here.
    folder.chmod(0o777)
    try:
        cluster.request("POST", "/api/v1/persistentvolumes", body=volume)
    except ApiError as error:
        # Made already, and the claim has not been told yet.
        if error.status != CONFLICT:
            raise
