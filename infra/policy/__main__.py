"""What the Pulumi engine starts: serves the pack until the engine ends it."""

from pulumi_policy import EnforcementLevel, PolicyPack

from infra.policy.pack import policies

PolicyPack(name="slipway", policies=policies(), enforcement_level=EnforcementLevel.ADVISORY)
