"""Show the variants to an administrator, and change them in the store that all gateways follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog

from service.core.errors import InvalidRequest, NotFound, Unavailable
from service.core.variant import VariantsChange, VariantState
from service.upstreams.fleet import Fleet
from service.upstreams.variants import NoVariantLeft, UnknownVariant, Variant, Variants, VariantsError

log = structlog.get_logger()


class Control:
    """See VariantControl in service/core/variant.py."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def sticky(self) -> str:
        return self._fleet.models.sticky

    def states(self) -> Sequence[VariantState]:
        return self._states(Variants({name: each.variant for name, each in self._fleet.running.items()}))

    async def change(self, change: VariantsChange, *, tenant: str, key: str, request_id: str) -> Sequence[VariantState]:
        before = Variants()

        def changed(found: Variants) -> Variants:
            nonlocal before
            before = found
            if not found.variants:
                raise VariantsError("the store has no variants any more: add them again with `glimpse variants add`")
            return found.changed(change.weights, change.draining)

        try:
            after = await self._fleet.store.change(changed)
        except UnknownVariant as exc:
            field = "weights" if exc.name in change.weights else "draining"
            raise NotFound(str(exc), param=f"{field}.{exc.name[:64]}", code="unknown_variant") from exc
        except NoVariantLeft as exc:
            raise InvalidRequest(str(exc), code="no_variant_left") from exc
        except VariantsError as exc:
            log.warning("variants_not_changed", tenant=tenant, key=key, request_id=request_id, reason=str(exc))
            raise Unavailable(
                "the store of the variants cannot be read or written (the gateway's log says why): try again, or use "
                "`glimpse variants` where the store is",
                cause=str(exc),
            ) from exc
        log.info(
            "variants_changed", tenant=tenant, key=key, request_id=request_id, before=words(before), after=words(after)
        )
        return self._states(after)

    def _states(self, variants: Variants) -> Sequence[VariantState]:
        return [
            self._state(each, share)
            for each, share in zip(variants.variants.values(), variants.shares.values(), strict=True)
        ]

    def _state(self, variant: Variant, share: float) -> VariantState:
        told = VariantState(variant.name, variant.weight, share, variant.is_draining)
        running = self._fleet.running.get(variant.name)
        if running is None or running.model is None:
            return told
        return replace(
            told,
            model=running.model.card.name,
            tritons=len(running.pool.addresses),
            tritons_out=len(running.pool.faults()),
            in_flight=running.model.in_flight,
        )


def words(variants: Variants) -> str:
    """Write weights in a line for the log."""
    return " ".join(
        f"{each.name}={each.weight:g}{' (draining)' if each.is_draining else ''}" for each in variants.variants.values()
    )
