"""No job can start another: what S3 gives notice of is written by clients alone."""

from __future__ import annotations

from tests.template.flows import FUNCTIONS

READS = ("s3:GetObject", "s3:GetObjectVersion", "s3:ListBucket")
REMOVES = ("s3:DeleteObject",)
# A form for a job's upload is signed with it. The function itself puts nothing there.
SIGNED_FOR_CLIENTS = {("ApiFunctionRole", "s3:PutObject", "UploadsBucket/awaited/*")}


def noticed(template):
    """Return the buckets and prefixes that S3 gives notice of."""
    found = set()
    for name, bucket in template.of_type("AWS::S3::Bucket").items():
        settings = bucket.get("NotificationConfiguration", {})
        assert set(settings) <= {"QueueConfigurations"}, "there is one way in, the queue"
        for notice in settings.get("QueueConfigurations", []):
            assert notice["Queue"] == {"Fn::GetAtt": ["UploadsQueue", "Arn"]}
            assert notice["Event"] == "s3:ObjectCreated:*"
            (rule,) = notice["Filter"]["S3Key"]["Rules"]
            assert rule["Name"] == "prefix"
            found.add((name, rule["Value"]))
    return found


def overlap(resource, bucket, prefix):
    """Whether a grant on `resource` reaches keys below a prefix of a bucket."""
    name, _, keys = resource.partition("/")
    if resource == "*":
        return True
    literal = keys.partition("*")[0]
    return name == bucket and (literal.startswith(prefix) or prefix.startswith(literal))


def written(template, calls):
    """Return function, bucket and key of everything that a function put into S3."""
    things = template.names_of_settings()
    return {
        (call.function, things[call.parameters["Bucket"]], call.parameters["Key"])
        for call in calls
        if call.service == "s3"
        and "Key" in call.parameters
        and not call.operation.startswith(("Get", "Head", "List", "Delete"))
    }


def test_notices_are_of_two_prefixes(template):
    assert noticed(template) == {("UploadsBucket", "inbox/"), ("UploadsBucket", "awaited/")}


def test_notices_do_not_overlap(template):
    # S3 refuses a configuration in which they do.
    prefixes = [prefix for _, prefix in noticed(template)]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]


def test_no_function_puts_anything_where_notices_come_from(template, calls):
    puts = written(template, calls)
    # Each function that is called writes something, and together they write everywhere that the service keeps things.
    assert {function for function, _, _ in puts} == set(FUNCTIONS)
    assert {(bucket, key.partition("/")[0]) for _, bucket, key in puts} == {
        ("UploadsBucket", "uploads"),
        ("UploadsBucket", "inputs"),
        ("UploadsBucket", "requests"),
        ("ResultsBucket", "results"),
        ("ResultsBucket", "outbox"),
    }
    for bucket, prefix in noticed(template):
        assert not [key for _, holder, key in puts if holder == bucket and key.startswith(prefix)], prefix


def test_no_role_may_put_anything_there_but_through_a_clients_form(template):
    puts = {
        (role, action, resource)
        for role, action, resource, _ in template.grants()
        if action.startswith("s3:") and action not in READS + REMOVES
    }
    assert puts > SIGNED_FOR_CLIENTS
    reaching = {put for put in puts for bucket, prefix in noticed(template) if overlap(put[2], bucket, prefix)}
    assert reaching == SIGNED_FOR_CLIENTS
    assert not [put for put in puts if overlap(put[2], "UploadsBucket", "inbox/")]


def test_overlap_is_told_from_neighbours():
    for resource in ("*", "B/*", "B/inbox/*", "B/in*", "B/inbox/a/*"):
        assert overlap(resource, "B", "inbox/"), resource
    for resource in ("B/inputs/*", "B/outbox/*", "C/inbox/*", "B/inbox-2/*"):
        assert not overlap(resource, "B", "inbox/"), resource
