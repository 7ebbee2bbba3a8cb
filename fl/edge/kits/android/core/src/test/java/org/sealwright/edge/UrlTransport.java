package org.sealwright.edge;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.HttpURLConnection;
import java.net.URL;
import java.security.GeneralSecurityException;
import java.security.cert.X509Certificate;
import java.util.HashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManager;
import javax.net.ssl.X509TrustManager;

/** The platform's own HTTP, to whoever answers: what comes over it verifies itself. */
final class UrlTransport implements Transport {
    private static final int TIMEOUT_MILLIS = 30_000;
    private final String address;
    private final SSLContext tls;

    UrlTransport(String address) throws GeneralSecurityException {
        this.address = address;
        tls = SSLContext.getInstance("TLS");
        tls.init(null, new TrustManager[] {new Anybody()}, null);
    }

    @Override
    public Response call(String method, String path, Map<String, String> headers, byte[] body, long limit)
            throws IOException {
        HttpsURLConnection call = (HttpsURLConnection) new URL(address + path).openConnection();
        call.setSSLSocketFactory(tls.getSocketFactory());
        call.setHostnameVerifier((name, session) -> true);
        call.setConnectTimeout(TIMEOUT_MILLIS);
        call.setReadTimeout(TIMEOUT_MILLIS);
        call.setInstanceFollowRedirects(false);
        call.setRequestMethod(method);
        headers.forEach(call::setRequestProperty);
        if (body != null) {
            call.setDoOutput(true);
            call.setFixedLengthStreamingMode(body.length);
            call.getOutputStream().write(body);
        }
        int status = call.getResponseCode();
        Map<String, String> told = new HashMap<>();
        for (Map.Entry<String, List<String>> one : call.getHeaderFields().entrySet()) {
            if (one.getKey() != null) told.put(one.getKey().toLowerCase(Locale.ROOT), one.getValue().get(0));
        }
        return read(status, told, status >= HttpURLConnection.HTTP_BAD_REQUEST ? call.getErrorStream() : call.getInputStream(), limit);
    }

    private static Response read(int status, Map<String, String> headers, InputStream stream, long limit)
            throws IOException {
        ByteArrayOutputStream content = new ByteArrayOutputStream();
        byte[] piece = new byte[1 << 16];
        boolean whole = true;
        try {
            for (int count; stream != null && (count = stream.read(piece)) >= 0; ) {
                content.write(piece, 0, count);
                if (content.size() > limit) break;
            }
        } catch (IOException error) {
            whole = false;
        }
        if (content.size() > limit) throw new IOException("the answer is too long");
        return new Response(status, headers, content.toByteArray(), whole);
    }

    private static final class Anybody implements X509TrustManager {
        @Override
        public void checkClientTrusted(X509Certificate[] chain, String type) {}

        @Override
        public void checkServerTrusted(X509Certificate[] chain, String type) {}

        @Override
        public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
    }
}
