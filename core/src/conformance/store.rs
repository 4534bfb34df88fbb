//! The suite for object stores.

use std::{collections::BTreeSet, path::Path};

use bytes::Bytes;

use super::together;
use crate::store::{ETag, Error, ObjectStore, ObjectStoreExt, PAGE, When};

/// Checks `store` against the contract of [`ObjectStore`]. It puts objects whose keys begin with
/// `prefix`, under which there must be none, and deletes them.
///
/// # Panics
///
/// If a sentence of the contract does not hold; the message names the key and thereby the check.
pub async fn store<S: ObjectStore + ?Sized>(store: &S, prefix: &str) {
    macro_rules! one_by_one {
        ($($check:ident),* $(,)?) => {$(
            let key = format!("{prefix}/{}", stringify!($check));
            $check(store, &key).await;
            store.delete_prefix(&format!("{key}/")).await.expect(&key);
            let left = store.keys(&format!("{key}/")).await.expect(&key);
            assert!(left.is_empty(), "{key}: {left:?} were deleted and are still listed");
        )*};
    }
    one_by_one![
        a_put_is_read_at_once,
        every_put_has_a_new_etag,
        a_put_if_absent_is_refused_over_an_object,
        a_put_if_it_matches_is_refused_over_another_version,
        one_of_racing_conditional_puts_wins,
        a_put_is_whole,
        a_range_is_cut_short_at_the_end,
        lists_are_in_order_and_in_pages,
        lists_hold_only_the_prefix,
        deleting_nothing_is_fine,
        files_go_up_and_come_down_whole,
        a_file_or_object_that_is_not_there_is_an_error,
    ];
}

async fn put<S: ObjectStore + ?Sized>(store: &S, key: &str, content: impl Into<Bytes>) -> ETag {
    let put = store.put(key, content.into(), When::Always).await;
    put.unwrap_or_else(|error| panic!("{key}: {error}"))
}

async fn get<S: ObjectStore + ?Sized>(store: &S, key: &str) -> Bytes {
    store.get(key, None).await.unwrap_or_else(|error| panic!("{key}: {error}")).content
}

/// Content of which every part is different.
fn content(len: usize) -> Bytes {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect::<Vec<u8>>().into()
}

fn lost(result: &Result<ETag, Error>, key: &str) -> bool {
    matches!(result, Err(Error::Precondition(named)) if named == key)
}

async fn a_put_is_read_at_once<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    for len in [0, 1, 10_000, 3 << 20, 5] {
        let content = content(len);
        put(store, &key, content.clone()).await;
        assert!(get(store, &key).await == content, "{key}: other content came back ({len} bytes)");
        let entries = store.list(&key, None).await.expect(&key);
        assert_eq!(entries.len(), 1, "{key}: is not listed once");
        assert_eq!((&entries[0].key, entries[0].len), (&key, len as u64), "{key}: is listed wrong");
    }
    store.delete(std::slice::from_ref(&key)).await.expect(&key);
    let gone = store.get(&key, None).await;
    assert!(matches!(&gone, Err(Error::NotFound(named)) if *named == key), "{key}: deleted, but {gone:?}");
    assert!(store.list(&key, None).await.expect(&key).is_empty(), "{key}: is deleted and still listed");
}

async fn every_put_has_a_new_etag<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    let mut seen = Vec::new();
    for _ in 0..3 {
        let etag = put(store, &key, "the same").await;
        assert_eq!(store.get(&key, None).await.expect(&key).etag, etag, "{key}: get and put differ");
        assert!(!seen.contains(&etag), "{key}: two puts of equal content have the same ETag");
        seen.push(etag);
    }
}

async fn a_put_if_absent_is_refused_over_an_object<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    for _ in 0..2 {
        store.put(&key, "first".into(), When::Absent).await.expect(&key);
        let second = store.put(&key, "second".into(), When::Absent).await;
        assert!(lost(&second, &key), "{key}: a put over an object gave {second:?}");
        assert_eq!(get(store, &key).await, "first", "{key}: a put that was refused changed the object");
        // Once it is deleted it is absent again.
        store.delete(std::slice::from_ref(&key)).await.expect(&key);
    }
}

async fn a_put_if_it_matches_is_refused_over_another_version<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    let first = put(store, &key, "first").await;
    let second = store.put(&key, "second".into(), When::Matches(first.clone())).await.expect(&key);
    for stale in [&first, &ETag("\"0123456789abcdef0123456789abcdef\"".into())] {
        let refused = store.put(&key, "third".into(), When::Matches(stale.clone())).await;
        assert!(lost(&refused, &key), "{key}: a put over another version gave {refused:?}");
    }
    assert_eq!(get(store, &key).await, "second", "{key}: a put that was refused changed the object");
    // Equal content is another version all the same.
    let again = store.put(&key, "second".into(), When::Matches(second.clone())).await.expect(&key);
    let refused = store.put(&key, "third".into(), When::Matches(second)).await;
    assert!(lost(&refused, &key), "{key}: a put over another version of equal content gave {refused:?}");
    store.delete(std::slice::from_ref(&key)).await.expect(&key);
    let refused = store.put(&key, "third".into(), When::Matches(again)).await;
    assert!(lost(&refused, &key), "{key}: a put over an object that is gone gave {refused:?}");
    let gone = store.get(&key, None).await;
    assert!(matches!(gone, Err(Error::NotFound(_))), "{key}: a put that was refused made an object");
}

async fn one_of_racing_conditional_puts_wins<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = &format!("{key}/object");
    let mut when = When::Absent;
    for round in 0..4 {
        let when_ref = &when;
        let puts = together::<Result<ETag, Error>>((0..16).map(|racer| {
            let content = Bytes::from(format!("{round} {racer}"));
            Box::pin(store.put(key, content, when_ref.clone())) as _
        }))
        .await;
        let winners: Vec<(usize, &ETag)> =
            puts.iter().enumerate().filter_map(|(racer, put)| Some((racer, put.as_ref().ok()?))).collect();
        assert_eq!(winners.len(), 1, "{key}: {} of 16 racing puts ({when:?}) won", winners.len());
        let losers = puts.iter().filter(|put| lost(put, key)).count();
        assert_eq!(losers, 15, "{key}: a racing put did not lose but fail: {puts:?}");
        let object = store.get(key, None).await.expect(key);
        let (racer, etag) = winners[0];
        assert_eq!(object.content, format!("{round} {racer}"), "{key}: another one's content is there");
        assert_eq!(object.etag, *etag, "{key}: another one's version is there");
        when = When::Matches(object.etag);
    }
}

async fn a_put_is_whole<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    const LEN: usize = 200 << 10;
    let key = &format!("{key}/object");
    put(store, key, vec![0; LEN]).await;
    together::<()>((0..8u8).map(|racer| {
        Box::pin(async move {
            for _ in 0..4 {
                if racer % 2 == 0 {
                    put(store, key, vec![racer; LEN]).await;
                } else {
                    let content = get(store, key).await;
                    let whole = content.len() == LEN && content.iter().all(|byte| *byte == content[0]);
                    assert!(whole, "{key}: a part of one put and a part of another were read");
                }
            }
        }) as _
    }))
    .await;
}

async fn a_range_is_cut_short_at_the_end<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let small = (format!("{key}/small"), content(1000));
    let large = (format!("{key}/large"), content(2 << 20));
    for (key, content) in [small, large] {
        let etag = put(store, &key, content.clone()).await;
        let len = content.len() as u64;
        for range in [0..1, 0..len, 1..len, 10..20, len - 1..len, len - 5..len + 5, 0..u64::MAX, 7..len * 2] {
            let object = store.get(&key, Some(range.clone())).await.expect(&key);
            let expected = &content[range.start as usize..range.end.min(len) as usize];
            assert!(object.content == expected, "{key}: {range:?} gave {} bytes", object.content.len());
            assert_eq!(object.etag, etag, "{key}: a range has another version");
        }
    }
}

async fn lists_are_in_order_and_in_pages<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    // In the order of the bytes: neither of numbers, nor of letters without case, nor of a locale.
    let odd = ["A", "B", "Z/1", "Z/10", "Z/2", "a", "a-", "a/", "a0", "zz", "ä", "€", "😀"];
    let mut keys: Vec<String> = odd.iter().map(|name| format!("{key}/{name}")).collect();
    keys.extend((keys.len()..PAGE + 3).map(|i| format!("{key}/n{i}")));
    // In another order than that of the list, and not all at once.
    keys.sort_by_key(|key| key.bytes().rev().collect::<Vec<_>>());
    for some in keys.chunks(32) {
        together::<()>(some.iter().map(|key| {
            Box::pin(async move {
                put(store, key, key.clone()).await;
            }) as _
        }))
        .await;
    }
    keys.sort();
    let prefix = format!("{key}/");
    assert_eq!(store.keys(&prefix).await.expect(key), keys, "{key}: not every key once and in order");
    let first = store.list(&prefix, None).await.expect(key);
    assert_eq!(first.len(), PAGE, "{key}: the first page is not full");
    assert!(first.iter().all(|entry| entry.len == entry.key.len() as u64), "{key}: a length is wrong");
    let last = store.list(&prefix, Some(&first[PAGE - 1].key)).await.expect(key);
    assert_eq!(last.len(), 3, "{key}: the last page has another length than what is left");
    // `after` need not exist, and may lie outside of the prefix.
    let between = |after: &str| keys.iter().filter(|key| key.as_str() > after).take(PAGE).cloned().collect();
    for after in [format!("{key}/n5"), format!("{key}/n500x"), keys[PAGE].clone(), "!".into(), "~".into()] {
        let page = store.list(&prefix, Some(&after)).await.expect(key);
        let page: Vec<String> = page.into_iter().map(|entry| entry.key).collect();
        let expected: Vec<String> = between(&after);
        assert!(page == expected, "{key}: the page after {after} is wrong");
    }
    // A page that is full, after which there is no more.
    store.delete(&keys[PAGE..]).await.expect(key);
    assert_eq!(store.keys(&prefix).await.expect(key), keys[..PAGE], "{key}: exactly one page");
    assert!(store.list(&prefix, Some(&keys[PAGE - 1])).await.expect(key).is_empty(), "{key}: past the end");
}

async fn lists_hold_only_the_prefix<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    for name in ["a/1", "a/2", "ab/1", "b"] {
        put(store, &format!("{key}/{name}"), name).await;
    }
    for (prefix, expected) in
        [("a/", &["a/1", "a/2"][..]), ("a", &["a/1", "a/2", "ab/1"]), ("b", &["b"]), ("b/", &[]), ("c", &[])]
    {
        let keys = store.keys(&format!("{key}/{prefix}")).await.expect(key);
        let expected: Vec<String> = expected.iter().map(|name| format!("{key}/{name}")).collect();
        assert_eq!(keys, expected, "{key}: the list of {prefix}");
    }
    store.delete_prefix(&format!("{key}/a/")).await.expect(key);
    let left: BTreeSet<String> = store.keys(&format!("{key}/")).await.expect(key).into_iter().collect();
    assert_eq!(left, BTreeSet::from([format!("{key}/ab/1"), format!("{key}/b")]), "{key}: deleted by prefix");
}

async fn deleting_nothing_is_fine<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    store.delete(&[]).await.expect(key);
    let (there, missing) = (format!("{key}/there"), format!("{key}/missing"));
    store.delete(std::slice::from_ref(&missing)).await.expect(key);
    put(store, &there, "x").await;
    store.delete(&[missing, there.clone()]).await.expect(key);
    assert!(matches!(store.get(&there, None).await, Err(Error::NotFound(_))), "{there}: is still there");
    store.delete(&[there]).await.expect(key);
}

async fn files_go_up_and_come_down_whole<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (from, mut etags) = (folder.path().join("from"), Vec::new());
    for (i, len) in [0, 1, (5 << 20) + 3, 100].into_iter().enumerate() {
        let content = content(len);
        std::fs::write(&from, &content).expect("a temporary file");
        store.upload(&key, &from).await.expect(&key);
        let to = folder.path().join(format!("to-{i}"));
        store.download(&key, &to).await.expect(&key);
        assert!(read(&to) == content, "{key}: {len} bytes went up, others came down");
        let object = store.get(&key, None).await.expect(&key);
        assert!(object.content == content, "{key}: {len} bytes went up, get gives others");
        etags.push(object.etag);
        if len > 20 {
            let part = store.get(&key, Some(10..20)).await.expect(&key).content;
            assert_eq!(part, content[10..20], "{key}: a part of an uploaded object");
        }
    }
    let distinct = etags.iter().map(|etag| &etag.0).collect::<BTreeSet<_>>().len();
    assert_eq!(distinct, etags.len(), "{key}: two uploads have the same ETag");
    // What was put comes down as well, and can be put over what was uploaded.
    put(store, &key, content(70_000)).await;
    let to = folder.path().join("to-put");
    store.download(&key, &to).await.expect(&key);
    assert!(read(&to) == content(70_000), "{key}: what was put came down different");
}

async fn a_file_or_object_that_is_not_there_is_an_error<S: ObjectStore + ?Sized>(store: &S, key: &str) {
    let key = format!("{key}/object");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let got = store.get(&key, None).await;
    assert!(matches!(&got, Err(Error::NotFound(named)) if *named == key), "{key}: is not there, but {got:?}");
    let got = store.get(&key, Some(0..1)).await;
    assert!(matches!(&got, Err(Error::NotFound(named)) if *named == key), "{key}: is not there, but {got:?}");
    let to = folder.path().join("to");
    let got = store.download(&key, &to).await;
    assert!(matches!(&got, Err(Error::NotFound(named)) if *named == key), "{key}: is not there, but {got:?}");
    assert!(!to.exists(), "{key}: is not there, but a file was written");
    let missing = folder.path().join("missing");
    let got = store.upload(&key, &missing).await;
    assert!(matches!(&got, Err(Error::File { .. })), "{key}: uploading no file gave {got:?}");
    assert!(store.list(&key, None).await.expect(&key).is_empty(), "{key}: was uploaded from no file");
    put(store, &key, "x").await;
    let got = store.download(&key, &missing.join("deeper")).await;
    assert!(matches!(&got, Err(Error::File { .. })), "{key}: downloading to nowhere gave {got:?}");
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
